"""The numbers and switches of a D2 step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CLASS_LOSSES = ("kl_reverse", "kl", "mse")
"""The names of L_c; the place of one here is the number that the kernels have for it."""


class StepOptions(NamedTuple):
    """What a step is told besides logits, sample numbers and bank; :func:`r2d2fast.d2_step` says what each means.

    The first four may be tensors. A normalizer of None is resolved by :meth:`normalizers`, not before: a number made from the
    batch size would make ``torch.compile`` recompile for every size.
    """

    alpha: float | Tensor = 0.1
    beta: float | Tensor = 0.03
    label_lr: float | Tensor = 4000.0
    grad_scale: float | Tensor = 1.0
    class_loss: str = "kl_reverse"
    normalizer: float | None = None
    update_normalizer: float | None = None
    update: bool = True

    @property
    def scalars(self) -> tuple[float | Tensor, ...]:
        """alpha, beta, label_lr and grad_scale."""
        return self[:4]

    def normalizers(self, rows: int) -> tuple[float, float]:
        """D and D_u of a batch of so many rows."""
        normalizer = max(rows, 1) if self.normalizer is None else self.normalizer
        return normalizer, normalizer if self.update_normalizer is None else self.update_normalizer

    def check(self, device: torch.device) -> None:
        """ValueError for a weight, divisor or class loss that has no meaning or would harm a bank on ``device``."""
        alpha, beta, label_lr, grad_scale = [
            scalar if isinstance(scalar, float) else _known(name, scalar, device)
            for name, scalar in zip(self._fields, self.scalars, strict=False)
        ]
        # One NaN here would overwrite every row of the batch in the bank.
        if not math.isfinite(alpha + beta + label_lr):
            raise ValueError(f"alpha is {alpha}, beta is {beta}, label_lr is {label_lr}; they must be finite")
        for name, value in (
            ("normalizer", self.normalizer),
            ("update_normalizer", self.update_normalizer),
            ("grad_scale", grad_scale),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if self.class_loss not in CLASS_LOSSES:
            raise ValueError(f"class_loss is {self.class_loss!r}; accepted: {', '.join(CLASS_LOSSES)}")


def _known(name: str, scalar: float | Tensor, device: torch.device) -> float:
    """A number as it is, and what a tensor holds; on a GPU 1, for reading it would make the host wait: the kernel checks it."""
    if not isinstance(scalar, Tensor):
        return scalar
    if scalar.dim() != 0 or scalar.dtype != torch.float32 or scalar.device != device:
        raise ValueError(
            f"{name} is a {scalar.dtype} tensor of shape {list(scalar.shape)} on {scalar.device}; "
            f"pass a number, or a float32 tensor of shape [] on {device}"
        )
    return 1.0 if scalar.is_cuda else float(scalar)
