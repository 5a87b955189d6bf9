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
    """The scalars of a step (DESIGN.md, section 3). A normalizer of None is resolved by :meth:`normalizers`, not before:
    a number made from the batch size would make ``torch.compile`` recompile for every size."""

    alpha: float
    beta: float
    label_lr: float
    class_loss: str
    normalizer: float | None
    update_normalizer: float | None
    grad_scale: float
    update: bool

    def normalizers(self, rows: int) -> tuple[float, float]:
        """D and D_u of a batch of so many rows."""
        normalizer = max(rows, 1) if self.normalizer is None else self.normalizer
        return normalizer, normalizer if self.update_normalizer is None else self.update_normalizer
