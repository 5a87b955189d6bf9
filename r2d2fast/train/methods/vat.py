"""Virtual adversarial training with entropy minimisation (Miyato et al., TPAMI 2018)."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.data import Embeddings, Images
from r2d2fast.models import frozen_statistics
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods.method import Method

MIYATO = "Miyato et al., 2018"
XI = 1e-6
DECAY_FROM, BETA1_END = 460 / 500, 0.5
CIFAR_VALUES = 3 * 32 * 32


class VAT(Method):
    """loss = CE(labelled) + w · mean over unlabelled samples of KL(p̄‖p(x + r)) + H(p).

    p̄ is p without a gradient; r = eps · g / ‖g‖, with g the gradient of KL(p(x)‖p(x + ξd)) by its second argument's input, for a
    random direction d: one step of the power method towards the change to which the prediction is most sensitive. Running
    statistics of batch norm are of labelled samples alone.
    """

    passes = 2
    labelled_share = 0.2  # 32 of 160
    recipe: ClassVar = {
        "unlabelled.weight": (1.0, MIYATO),
        "unlabelled.eps": (8.0, MIYATO),
        "optimizer": ("adamw", MIYATO),  # without weight decay it is Adam
        "stage2.lrs": ((0.001,), MIYATO),
        "weight_decay": (0.0, MIYATO),
    }
    recipes: ClassVar = {
        "cifar10": {"stage2.epochs": (556, MIYATO)},  # 400 · 500 steps of 128 among 46 000
        "svhn": {"unlabelled.eps": (3.5, MIYATO)},
    }

    @staticmethod
    def check(config: Config, images: Images) -> None:
        """See the base class."""
        if isinstance(images, Embeddings):
            raise ConfigError(
                "--method vat: changes pixels by --unlabelled.eps, which has no size among embeddings; it takes images"
            )

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """The learning rate falls linearly to 0 over the last 40 of 500 epochs, where Adam's β₁ is 0.5."""
        end = progress >= DECAY_FROM
        return {
            "lr": lr * min((1 - progress) / (1 - DECAY_FROM), 1.0),
            "betas": (BETA1_END if end else 0.9, 0.999),
        }

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """Logits of x, and after them those of the unlabelled samples' x + r."""
        (images,), network = views, self.trainer.network
        unlabelled = images[: self.unlabelled]
        labelled = network(images[self.unlabelled :])
        with frozen_statistics(self.trainer.model):
            changed = unlabelled + self.perturbation(unlabelled)
            return torch.cat([network(unlabelled), labelled, network(changed)])

    def perturbation(self, images: Tensor) -> Tensor:
        """r, of images ``[b, C, H, W]``; batch norm normalises them in training mode."""
        model, length = self.trainer.model, self.trainer.config.unlabelled.eps
        # In float32 whatever the run's precision: a change by ξ is lost in 16 bits.
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                predicted = model(images).softmax(1)
            probe = (XI * _normalised(torch.randn_like(images))).requires_grad_()
            with torch.enable_grad():
                divergence = F.kl_div(model(images + probe).log_softmax(1), predicted, reduction="sum")
                (gradient,) = torch.autograd.grad(divergence, probe)
        return length * math.sqrt(images[0].numel() / CIFAR_VALUES) * _normalised(gradient)

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        log_p = logits[: self.unlabelled].log_softmax(1)
        divergence = F.kl_div(logits[len(index) :].log_softmax(1), log_p.detach().exp(), reduction="batchmean")
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return self.labelled_loss(logits, index) + self.trainer.config.unlabelled.weight * (divergence + entropy)


def _normalised(changes: Tensor) -> Tensor:
    """Each sample's change at length 1."""
    return changes / changes.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * (changes.ndim - 1))
