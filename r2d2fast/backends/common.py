"""What every backend is given."""

from typing import NamedTuple

from torch import Tensor

STATISTICS = ("rows", "class_loss", "entropy", "prediction_confidence", "pseudo_confidence", "agreement", "skipped")
"""Running sums a step adds to (float64 ``[7]``): over the unlabelled rows with finite logits, and the number without."""


class BankTensors(NamedTuple):
    """The part of a bank that a step uses; the attributes of :class:`r2d2fast.PseudoLabelBank` with these names."""

    pseudo_logits: Tensor
    slots: Tensor
    step: Tensor
    label_scale: float
    rounding: str
    seed: int


class Step(NamedTuple):
    """The scalars of a step (DESIGN.md, section 3)."""

    alpha: float
    beta: float
    label_lr: float
    class_loss: str
    normalizer: float
    update_normalizer: float
    grad_scale: float
    update: bool
