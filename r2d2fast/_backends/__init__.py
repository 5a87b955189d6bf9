"""Which code computes a step, and why (DESIGN.md, section 4)."""

import logging
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from r2d2fast._backends import cpu, native, reference
from r2d2fast.errors import BackendError

NAMES = ("reference", "cpu", "cuda", "triton")

_log = logging.getLogger("r2d2fast")
_said: set[str] = set()


class BackendStatus(NamedTuple):
    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """Every backend with whether it is available, and what it is or why not."""
    if native.module is None:
        cpu_status = BackendStatus(False, str(native.problem))
    else:
        found = ", ".join(native.module.instruction_sets())
        cpu_status = BackendStatus(
            True, f"C++ on CPU tensors, using {native.module.instruction_set()} (runs here: {found})"
        )
    return {
        "reference": BackendStatus(True, "PyTorch in float64 on any device and dtype; slow, the definition"),
        "cpu": cpu_status,
        "cuda": BackendStatus(False, "not part of this version; CUDA tensors use the reference"),
        "triton": BackendStatus(False, "not part of this version; CUDA tensors use the reference"),
    }


def choose(name: str, logits: Tensor, rows: Tensor) -> ModuleType:
    """The backend module for these tensors; BackendError says why one asked for by name cannot take them."""
    if name == "auto":
        why_not = _why_not_cpu(logits, rows)
        if why_not is None:
            return cpu
        if why_not not in _said:
            _said.add(why_not)
            _log.warning("using the slow reference backend: %s", why_not)
        return reference
    if name == "reference":
        return reference
    if name == "cpu":
        why_not = _why_not_cpu(logits, rows)
        if why_not is None:
            return cpu
        raise BackendError(f"backend 'cpu' cannot be used: {why_not}")
    if name in NAMES:
        raise BackendError(f"backend {name!r} cannot be used: {backends()[name].detail}")
    raise BackendError(f"backend is {name!r}; accepted: auto, {', '.join(NAMES)}")


def _why_not_cpu(logits: Tensor, rows: Tensor) -> str | None:
    if native.module is None:
        return native.problem
    if not logits.is_cpu:
        return f"the logits are on {logits.device}, and this version has kernels for CPU tensors only"
    if logits.dtype not in cpu.DTYPES or rows.dtype not in cpu.DTYPES:
        return f"the C++ kernel takes float32, bfloat16 and float16; the logits are {logits.dtype}"
    return None
