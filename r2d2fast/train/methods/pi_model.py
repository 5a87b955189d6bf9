"""Π model (Laine & Aila, ICLR 2017): two views of a sample should be predicted alike."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.train.methods.method import Method
from r2d2fast.train.methods.ramps import fall, rise

LAINE = "Laine & Aila, 2017"
RAMP, END, BETA1_END = 80 / 300, 50 / 300, 0.5
# AdamW without weight decay is Adam.
RECIPE = {
    "optimizer": ("adamw", LAINE),
    "stage2.lrs": ((0.003,), LAINE),
    "weight_decay": (0.0, LAINE),
    "unlabelled.ramp": (RAMP, LAINE),
}
RECIPES: dict[str, dict[str, tuple[Any, str]]] = {
    "cifar10": {"stage2.epochs": (300, LAINE)},
    "cifar100": {"stage2.epochs": (300, LAINE)},
    "svhn": {"stage2.epochs": (300, LAINE), "stage2.lrs": ((0.001,), LAINE)},
}


class PiModel(Method):
    """loss = Σ CE(labelled) / B + w(t) · w_max · L / B · mean (p − p′)², over unlabelled samples and classes.

    p and p′ are of two views, augmented and dropped out otherwise; the gradient goes through both.

    The authors' batches are drawn from all samples, so that L / B, the labelled share of a batch, is that of the data set; and
    they compare the views of labelled samples, too.
    """

    passes = 2
    second_view = True
    recipe = RECIPE | {"unlabelled.weight": (100.0, LAINE)}
    recipes = RECIPES

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """The learning rate rises with the weight, and falls to 0 in the end; Adam's β₁ falls to 0.5."""
        end = fall(progress, END)
        return {"lr": lr * rise(progress, RAMP) * end, "betas": (0.9 * end + BETA1_END * (1 - end), 0.999)}

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """One after the other, so that each view is normalised, and dropped out, by itself."""
        return torch.cat([self.trainer.network(images) for images in views])

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        first, second = logits[: self.unlabelled].softmax(1), logits[len(index) :].softmax(1)
        return self.with_consistency(logits, index, F.mse_loss(first, second))

    def with_consistency(self, logits: Tensor, index: Tensor, distance: Tensor) -> Tensor:
        """The loss, with ``distance`` in place of the mean square."""
        settings = self.trainer.config.unlabelled
        weight = settings.weight * rise(self.trainer.progress(), settings.ramp)
        return (self.labelled_loss(logits, index) + weight * distance) * (self.labelled / len(index))
