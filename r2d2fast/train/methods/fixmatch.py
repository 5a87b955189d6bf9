"""FixMatch (Sohn et al., NeurIPS 2020): what a weak view shows with confidence, a strong view is to learn."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.data import Augmentation, Images, ResidentImages
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods.method import Method

SOHN = "Sohn et al., 2020"


class FixMatch(Method):
    """loss = CE(labelled) + w · mean over unlabelled samples of [max p ≥ threshold] · CE(p′, argmax p).

    p is the prediction for the weak view, the data set's augmentation, without a gradient; p′ that for the strong view, to which
    RandAugment and, where the recipe has one, cutout are added.
    """

    passes = 2
    second_view = True
    capturable = True
    labelled_share = 1 / 8  # μ = 7
    recipe: ClassVar = {
        "unlabelled.weight": (1.0, SOHN),
        "unlabelled.threshold": (0.95, SOHN),
        "stage2.lrs": ((0.03,), SOHN),
        "ema": (0.999, SOHN),
        "weight_decay": (5e-4, SOHN),
    }

    @staticmethod
    def check(config: Config, images: Images) -> None:
        """See the base class."""
        if not isinstance(images, ResidentImages):
            raise ConfigError(
                "--method fixmatch: its strong view, RandAugment, is of images held in memory, of at most 64 pixels; take "
                "such ones, or another --method"
            )

    def second_augmentation(self, augmentation: Augmentation) -> Augmentation:
        """See the class."""
        return replace(augmentation, randaugment=True, cutout=self.trainer.config.cutout)

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """A cosine of 7/16 of a half period."""
        return {"lr": lr * math.cos(7 / 16 * math.pi * progress)}

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """All in one pass, as one batch of batch norm."""
        return self.trainer.network(torch.cat(views))

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        settings = self.trainer.config.unlabelled
        confidence, classes = logits[: self.unlabelled].detach().softmax(1).max(1)
        losses = F.cross_entropy(logits[len(index) :], classes, reduction="none") * (confidence >= settings.threshold)
        return self.labelled_loss(logits, index) + settings.weight * losses.mean()
