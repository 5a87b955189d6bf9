"""Placeholder until the Triton kernels land."""

from torch import Tensor

from r2d2fast._backends.common import BackendStatus


def status() -> BackendStatus:
    return BackendStatus(False, "not there yet")


def why_not(logits: Tensor, rows: Tensor) -> str | None:
    return "not there yet"
