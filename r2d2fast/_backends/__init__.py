"""Which backends there are, and which one takes given tensors."""

import logging
from types import ModuleType

from torch import Tensor

from r2d2fast._backends import cpu, cuda, reference, triton
from r2d2fast._backends.common import BackendStatus
from r2d2fast.errors import BackendError

_MODULES = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
NAMES = tuple(_MODULES)

_log = logging.getLogger("r2d2fast")
_said: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Every backend with whether it is available, and what it is or why not."""
    return {name: module.status() for name, module in _MODULES.items()}


def choose(name: str, logits: Tensor, rows: Tensor) -> ModuleType:
    """The backend module for these tensors; BackendError says why one asked for by name cannot take them."""
    if name == "auto":
        return _best(logits, rows)
    if name not in _MODULES:
        raise BackendError(f"backend is {name!r}; accepted: auto, {', '.join(NAMES)}")
    why_not = _MODULES[name].why_not(logits, rows)
    if why_not is not None:
        raise BackendError(f"backend {name!r} cannot be used: {why_not}")
    return _MODULES[name]


def _best(logits: Tensor, rows: Tensor) -> ModuleType:
    reasons: list[str] = []
    for module in (cuda, triton) if logits.is_cuda else (cpu,):
        why_not = module.why_not(logits, rows)
        if why_not is None:
            if reasons:
                _say_once("triton", reasons)
            return module
        reasons.append(why_not)
    _say_once("slow reference", reasons)
    return reference


def _say_once(name: str, reasons: list[str]) -> None:
    """``auto`` never falls back silently."""
    message = "; ".join(reasons)
    if message not in _said:
        _said.add(message)
        _log.warning("using the %s backend: %s", name, message)
