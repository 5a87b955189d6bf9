"""Splits as text files, the field's format: a line ``name class`` for each labelled sample."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data.errors import DataError
from r2d2fast.files import replace_file


def write_split(path: Path, names: Sequence[str], labels: Tensor, class_names: Sequence[str]) -> None:
    """Write the labelled samples of a split, in the order of their numbers.

    A class is written by its name; by its number, from 0, if its name has a space in it (``Ankle boot``).

    Args:
        path: the file; written whole or not at all.
        names: M names, as ``Dataset.train_names``.
        labels: int64 ``[M]``, −1 for an unlabelled sample.
        class_names: N names.

    Raises:
        DataError: the file cannot be written, or :func:`read_split` would read something else from it.
    """
    accepted = _accepted(class_names)
    lines = []
    for sample in (labels >= 0).nonzero().flatten().tolist():
        name, label = names[sample], int(labels[sample])
        word = str(label) if class_names[label].split() != [class_names[label]] else class_names[label]
        if accepted[word] != label:
            raise DataError(
                f"class {label} is called {class_names[label]!r}, whose space a split file cannot hold, and its number is "
                f"the name of class {accepted[word]}; rename one of them"
            )
        if name.splitlines() != [name] or not name.strip():
            raise DataError(f"sample {sample} is called {name!r}, which is no line of a split file; rename it")
        lines.append(f"{name} {word}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names need not be UTF-8: what Python made of such bytes becomes the same bytes again.
        replace_file(path, "".join(lines).encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free some space or name another file") from error


def read_split(path: Path, names: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The labels that a split file gives.

    The class is the last word of a line, a name or a number from 0 (where both fit, the name counts); the sample's name is all
    before the space in front of it. Empty lines mean nothing.

    Args:
        path: the file.
        names: M different names, as ``Dataset.train_names``.
        class_names: N names.

    Returns:
        int64 ``[M]``, −1 for a sample that the file does not name.

    Raises:
        DataError: the file cannot be read, labels nothing, or has a line with an unknown name or class or a sample for the second
            time; the message has the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read the split file {path}: {error.strerror}") from error
    samples = {name: sample for sample, name in enumerate(names)}
    accepted = _accepted(class_names)
    labels = torch.full((len(names),), -1, dtype=torch.int64)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, _, word = line.rstrip().rpartition(" ")
        place = f"{path}, line {number}"
        if not name:
            raise DataError(f"{place}: {line.rstrip()!r} is not a sample's name, a space and a class")
        if name not in samples:
            raise DataError(f"{place}: the data set has no training sample {name!r}; its names are like {names[0]!r}")
        if word not in accepted:
            raise DataError(
                f"{place}: {word!r} is no class; accepted: 0 to {len(class_names) - 1}, or a name: {_some(class_names)}"
            )
        if name in lines:
            raise DataError(f"{place}: {name!r} is in line {lines[name]} already; name each sample once")
        lines[name] = number
        labels[samples[name]] = accepted[word]
    if not lines:
        raise DataError(f"{path} labels no sample; it takes a line of name and class for each labelled one")
    return labels


def _accepted(class_names: Sequence[str]) -> dict[str, int]:
    """The classes by number and by name."""
    numbers = {str(label): label for label in range(len(class_names))}
    return numbers | {name: label for label, name in enumerate(class_names)}


def _some(class_names: Sequence[str]) -> str:
    return ", ".join(class_names[:10]) + (", …" if len(class_names) > 10 else "")
