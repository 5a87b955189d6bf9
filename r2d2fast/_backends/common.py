"""What every backend is given, and what it says about itself."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("rows", "class_loss", "entropy", "prediction_confidence", "pseudo_confidence", "agreement", "skipped")
"""Running sums a step adds to (float64 ``[7]``): over the unlabelled rows with finite logits, and the number without."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of logits and rows, with the numbers that the kernels have for them."""

CLASS_LOSSES = {"kl_reverse": 0, "kl": 1, "mse": 2}

SCALARS = ("alpha", "beta", "label_lr", "grad_scale")
"""The numbers of a step that may be tensors, so that a compiled or captured step goes on with new values."""


class BackendStatus(NamedTuple):
    available: bool
    detail: str


@dataclass
class BankTensors:
    """The part of a bank that a step uses; the attributes of :class:`r2d2fast.PseudoLabelBank` with these names."""

    pseudo_logits: Tensor
    slots: Tensor
    step: Tensor
    status: Tensor
    label_scale: float
    rounding: str
    seed: int


class Step(NamedTuple):
    """The scalars of a step (DESIGN.md, section 3). A normalizer of None is resolved by :meth:`normalizers`, not before:
    a number made from the batch size would make ``torch.compile`` recompile for every size."""

    alpha: float | Tensor
    beta: float | Tensor
    label_lr: float | Tensor
    grad_scale: float | Tensor
    class_loss: str
    normalizer: float | None
    update_normalizer: float | None
    update: bool

    def normalizers(self, rows: int) -> tuple[float, float]:
        """D and D_u of a batch of so many rows."""
        normalizer = max(rows, 1) if self.normalizer is None else self.normalizer
        return normalizer, normalizer if self.update_normalizer is None else self.update_normalizer


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
