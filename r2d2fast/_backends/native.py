"""The one loader of native code; "not built" and "built, but broken" are different messages."""

import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple

# PyTorch first: its libgomp then serves the extension too, which so shares PyTorch's pool of threads.
import torch  # noqa: F401


class Library(NamedTuple):
    module: ModuleType | None
    problem: str | None


def _load(name: str, what: str, needs: str) -> Library:
    rebuild = f"run `pip install -e .` again in the r2d2fast checkout, with {needs}"
    if importlib.util.find_spec(f"r2d2fast.{name}") is None:
        return Library(None, f"{what} were not built; {rebuild}")
    try:
        return Library(importlib.import_module(f"r2d2fast.{name}"), None)
    except ImportError as error:
        return Library(None, f"{what} were built, but do not load ({error}); {rebuild}")


cpu = _load("_C", "the C++ kernels", "a C++17 compiler installed")
cuda = _load(
    "_cuda", "the CUDA kernels", "nvcc of CUDA 12.4 or later on PATH (R2D2FAST_CUDA=1 makes its absence an error)"
)
