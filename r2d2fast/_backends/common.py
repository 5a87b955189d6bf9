"""What the backends have in common."""

from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("rows", "class_loss", "entropy", "prediction_confidence", "pseudo_confidence", "agreement", "skipped")
"""Running sums a step adds to (float64 ``[7]``): over the unlabelled rows with finite logits, and the number without."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of logits and rows, with the numbers that the kernels have for them."""


class BackendStatus(NamedTuple):
    available: bool
    detail: str


def unsupported_dtype(logits: Tensor, rows: Tensor) -> str | None:
    """Why the kernels cannot take these dtypes, or None."""
    if logits.dtype in DTYPES and rows.dtype in DTYPES:
        return None
    return f"the kernels take float32, bfloat16 and float16; the logits are {logits.dtype}"


def address_of(gradient: Tensor) -> int:
    """Where an upstream gradient lies in memory; 0 if it has none: a batch of them (vmap over backward), a symbolic zero."""
    try:
        return gradient.data_ptr()
    except RuntimeError:
        return 0
