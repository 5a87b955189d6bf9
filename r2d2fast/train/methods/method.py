"""What the training loop asks of a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch
    from r2d2fast.train.trainer import Trainer

# Of logits [B, N], sample numbers [B] and the size of the global batch: the loss, and its gradient times the precision's scale.
LossFunction = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Method:
    """What a run does with unlabelled samples. The loop asks a method for a loss; the other answers below are those of a method
    that keeps nothing.

    Args:
        trainer: of this rank, whole but for its method. A method reads from it whatever it needs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def at_stage(self, stage: int | None) -> None:
        """The run has come to an epoch of ``stage``, trained or resumed; None at its end."""

    def before_epoch(self, epoch: Epoch) -> None:
        """Called before the first step of an epoch."""

    def loss_function(self, epoch: Epoch) -> LossFunction:
        """The loss of the steps that follow. Each rank divides by its share of the global batch, as gradients are averaged over
        ranks."""
        raise NotImplementedError

    def stops(self, epoch: Epoch) -> bool:
        """Whether the stage ends with ``epoch``, whose steps are done, though the schedule has more of it."""
        return False

    def hard_labels(self) -> Tensor | None:
        """int64 ``[M]``, the same on every rank: the class of every sample; None where the method keeps none."""
        return None

    def pseudo_labels(self) -> tuple[Tensor, Tensor] | None:
        """The hard labels, and float32 ``[M]`` the probability of each; None where the method keeps none."""
        return None

    def metrics(self, epoch: Epoch) -> dict[str, Any]:
        """Metrics of an epoch whose steps are done; every rank calls this."""
        return {}

    def memory(self) -> list[str]:
        """Sentences that say what it keeps, for ``--dry-run``."""
        return []

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint has to hold, tensors that share memory with the method's own; those of rows as ``Ranks.shard``
        gives them."""
        return {}

    def values(self) -> dict[str, Any]:
        """The rest of it, as plain values for JSON; every rank calls this."""
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`values` gave, perhaps on another number of ranks; the tensors follow."""

    def cross_entropy(self, targets: Tensor) -> LossFunction:
        """The mean cross entropy with the classes ``targets``, int64 ``[M]``."""
        ranks, precision = self.trainer.ranks, self.trainer.precision

        def loss_function(logits: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
            leaf = logits.requires_grad_()
            loss = F.cross_entropy(leaf.float(), targets[index], reduction="sum") * (ranks.count / total)
            (grad,) = torch.autograd.grad(loss * precision.scale(), leaf)
            return loss.detach(), grad

        return loss_function
