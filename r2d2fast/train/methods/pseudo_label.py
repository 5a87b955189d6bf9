"""Pseudo-Label (Lee, ICML workshop 2013): a class that is predicted with confidence is learned as if it were given."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.models import frozen_statistics
from r2d2fast.train.methods.method import Method

LEE = "Lee, 2013"
USB = "Wang et al., USB, 2022"


class PseudoLabel(Method):
    """loss = CE(labelled) + w(t) · mean over unlabelled samples of [max p ≥ threshold] · CE(p, argmax p).

    w rises linearly over the first part of the run, in which the network predicts badly. Running statistics of batch norm are of
    labelled samples alone.
    """

    labelled_share = 0.5  # 64 of 128 (USB)
    recipe: ClassVar = {
        "unlabelled.weight": (1.0, USB),
        "unlabelled.ramp": (0.4, USB),
        "unlabelled.threshold": (0.95, USB),
        "stage2.lrs": ((0.03,), USB),
        "ema": (0.999, USB),
        "weight_decay": (5e-4, USB),
    }

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """A cosine of 7/16 of a half period (USB)."""
        return {"lr": lr * math.cos(7 / 16 * math.pi * progress)}

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """Unlabelled and labelled samples apart, so that each half is normalised by itself."""
        (images,) = views
        with frozen_statistics(self.trainer.model):
            unlabelled = self.trainer.network(images[: self.unlabelled])
        return torch.cat([unlabelled, self.trainer.network(images[self.unlabelled :])])

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        settings, unlabelled = self.trainer.config.unlabelled, logits[: self.unlabelled]
        confidence, classes = unlabelled.detach().softmax(1).max(1)
        losses = F.cross_entropy(unlabelled, classes, reduction="none") * (confidence >= settings.threshold)
        ramp = min(self.trainer.progress() / settings.ramp, 1.0) if settings.ramp else 1.0
        return self.labelled_loss(logits, index) + settings.weight * ramp * losses.mean()
