"""The one loader of the native module ``r2d2fast._C``; "not built" and "built, but broken" are different messages."""

import importlib
import importlib.util
from types import ModuleType

# PyTorch first: its libgomp then serves the extension too, which so shares PyTorch's pool of threads.
import torch  # noqa: F401

_REBUILD = "run `pip install -e .` again in the r2d2fast checkout, with a C++17 compiler installed"


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("r2d2fast._C") is None:
        return None, f"the C++ kernels were not built; {_REBUILD}"
    try:
        return importlib.import_module("r2d2fast._C"), None
    except ImportError as error:
        return None, f"the C++ kernels were built, but do not load ({error}); {_REBUILD}"


module, problem = _load()
