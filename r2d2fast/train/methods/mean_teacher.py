"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017): a sample should be predicted as the averaged network predicts it."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.data import Images
from r2d2fast.models import frozen_statistics
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods.method import Method
from r2d2fast.train.methods.ramps import rise

TARVAINEN = "Tarvainen & Valpola, 2017"
EPOCHS, COSINE_EPOCHS, RAMP_EPOCHS = 180, 210, 5


class MeanTeacher(Method):
    """loss = Σ CE(labelled) / B + w · w(t) · mean (p − p̄)², over unlabelled samples and classes, with p̄ the prediction of the
    averaged network for a second view, batch norm as in training.

    The recipe is that of the authors' Shake-Shake. They compare the predictions for labelled samples, too.
    """

    second_view = True
    recipe: ClassVar = {
        "unlabelled.weight": (100.0, TARVAINEN),
        "unlabelled.ramp": (RAMP_EPOCHS / EPOCHS, TARVAINEN),
        "stage2.lrs": ((0.05,), TARVAINEN),
        "ema": (0.97, TARVAINEN),
        "weight_decay": (2e-4, TARVAINEN),
    }
    recipes: ClassVar = {"cifar10": {"stage2.epochs": (EPOCHS, TARVAINEN)}}

    @staticmethod
    def check(config: Config, images: Images) -> None:
        """See the base class."""
        if config.ema == 0:
            raise ConfigError("--ema 0: mean-teacher learns from averaged weights; accepted: above 0, below 1")

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """The first 180 of a cosine of 210 epochs."""
        return {"lr": lr * 0.5 * (1 + math.cos(math.pi * progress * EPOCHS / COSINE_EPOCHS))}

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """See the base class."""
        images, again = views
        assert self.trainer.averaged is not None
        teacher = self.trainer.averaged.model.train()
        with torch.no_grad(), frozen_statistics(teacher):
            self.target = teacher(again).float().softmax(1)
        return self.trainer.network(images)

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        settings = self.trainer.config.unlabelled
        weight = settings.weight * rise(self.trainer.progress(), settings.ramp)
        distance = F.mse_loss(logits[: self.unlabelled].softmax(1), self.target)
        return self.labelled_loss(logits, index) * (self.labelled / len(index)) + weight * distance
