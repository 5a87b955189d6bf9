"""Help texts of command lines as paragraphs, which a terminal breaks where it ends, and not where their source does."""

import ast
import inspect
import shutil
import textwrap
from itertools import pairwise
from typing import Any, TypeVar

T = TypeVar("T")


def field_texts(cls: type) -> dict[str, str]:
    """The docstring below each field in the source of ``cls``, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text: Any = ast.literal_eval(below.value)
            texts[ast.unparse(field.target)] = " ".join(text.split())
    return texts


def with_help_texts(cls: type[T]) -> type[T]:
    """``cls``, a dataclass, with the texts of its fields in its docstring, where tyro takes them as they are; from the source it
    would take them with its line breaks and indentation."""
    cls.__doc__ = docstring(cls.__doc__ or "", field_texts(cls))
    return cls


def docstring(description: str, texts: dict[str, str]) -> str:
    """The docstring of a class with these fields."""
    arguments = "\n".join(f"    {name}: {text}" for name, text in texts.items())
    return f"{inspect.cleandoc(description)}\n\nArgs:\n{arguments}\n"


def description(cls: type, more: str = "") -> str:
    """What ``cls`` is, by its docstring, and ``more``, as wide as the terminal. tyro leaves lines alone that are indented."""
    about = inspect.cleandoc(cls.__doc__ or "").partition("\n\nArgs:")[0]
    width = shutil.get_terminal_size().columns
    return textwrap.fill(" ".join([*about.split(), *more.split()]), width, initial_indent="  ", subsequent_indent="  ")
