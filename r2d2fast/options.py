"""The numbers and switches of a D2 step."""

import math
import numbers
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

CLASS_LOSSES = ("kl_reverse", "kl", "mse")
"""The names of L_c; the place of one here is the number that the kernels have for it."""
REDUCTIONS = ("mean", "sum", "none")
"""What becomes of the losses of a batch's rows, by PyTorch's names."""


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
    reduction: str = "mean"
    batches: int = 1  # of equal size make up an optimizer step; D_u, by default, counts all of them

    @property
    def scalars(self) -> tuple[float | Tensor, ...]:
        """alpha, beta, label_lr and grad_scale."""
        return self[:4]

    def normalizers(self, rows: int) -> tuple[float, float]:
        """D and D_u of a batch of so many rows. A sum, and losses that are not added up, are divided by nothing."""
        divisor = max(rows, 1) if self.normalizer is None else self.normalizer
        update_divisor = divisor * self.batches if self.update_normalizer is None else self.update_normalizer
        return divisor if self.reduction == "mean" else 1, update_divisor

    def check(self, rows: Tensor) -> None:
        """TypeError or ValueError for what has no meaning or would harm a bank with these rows."""
        global _sound
        alpha, beta, label_lr, grad_scale = self[:4]
        # A small step takes 25 µs in all, and its options are most often those of the one before.
        plain = (
            type(alpha) is type(beta) is type(label_lr) is type(grad_scale) is float
            and (self.normalizer is None or type(self.normalizer) is float)
            and (self.update_normalizer is None or type(self.update_normalizer) is float)
        )
        if plain and self == _sound:
            return
        if not plain:
            device = rows.device
            alpha, beta, label_lr, grad_scale = [
                _known(name, scalar, device) for name, scalar in zip(self._fields, self.scalars, strict=False)
            ]
        # One NaN here would overwrite every row of the batch in the bank.
        if not math.isfinite(alpha + beta + label_lr):
            raise ValueError(f"alpha is {alpha}, beta is {beta}, label_lr is {label_lr}; they must be finite")
        if label_lr < 0:
            raise ValueError(f"label_lr is {label_lr}; it must not be negative, or pseudo-labels would go up the loss")
        self._replace(grad_scale=grad_scale).check_reduction()
        if self.class_loss not in CLASS_LOSSES:
            raise ValueError(f"class_loss is {self.class_loss!r}; accepted: {', '.join(CLASS_LOSSES)}")
        if plain:
            _sound = self

    def check_reduction(self) -> None:
        """The same of the reduction, its divisors and a plain grad_scale, which ``torch.compile`` can trace."""
        for name, value in (
            ("normalizer", self.normalizer),
            ("update_normalizer", self.update_normalizer),
            ("grad_scale", None if isinstance(self.grad_scale, Tensor) else self.grad_scale),
        ):
            if value is None:
                continue
            if not isinstance(value, float):
                check_number(name, value)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}; accepted: {', '.join(REDUCTIONS)}")
        if self.reduction != "mean" and self.normalizer is not None:
            raise ValueError(
                f"normalizer={self.normalizer} is what reduction='mean' divides by, and reduction is {self.reduction!r}; "
                "leave it out, and pass update_normalizer for what the update of the pseudo-labels is divided by"
            )


_sound: StepOptions | None = None
"""The last options of numbers alone that passed :meth:`StepOptions.check`."""


def warn_of_small_alpha(alpha: float | Tensor, beta: float | Tensor, stacklevel: int) -> None:
    """A UserWarning for numbers alpha <= beta. Tensors are not looked at: on a GPU the host would wait for them."""
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor) or alpha > beta:
        return
    warnings.warn(
        f"alpha={alpha} <= beta={beta}: by Theorem 1 of the paper, p̃ = exp(-L/alpha) p̂^(1 - beta/alpha), so that "
        "pseudo-labels then no longer grow with the predictions; the paper uses alpha=0.1, beta=0.03",
        stacklevel=stacklevel + 1,
    )


def check_number(name: str, value: object) -> None:
    """TypeError unless ``value`` is a real number."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; pass a number")


def _known(name: str, scalar: float | Tensor, device: torch.device) -> float:
    """A number as it is, and what a tensor holds; on a GPU 1, for reading it would make the host wait: the kernel checks it."""
    if not isinstance(scalar, Tensor):
        check_number(name, scalar)
        return scalar
    if scalar.dim() != 0 or scalar.dtype != torch.float32 or scalar.device != device:
        raise ValueError(
            f"{name} is a {scalar.dtype} tensor of shape {list(scalar.shape)} on {scalar.device}; "
            f"pass a number, or a float32 tensor of shape [] on {device}"
        )
    return 1.0 if scalar.is_cuda else float(scalar)
