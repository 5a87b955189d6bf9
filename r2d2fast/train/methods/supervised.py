"""Learning from the labelled samples alone, which stage 1 does whatever the method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r2d2fast.train.methods.method import LossFunction, Method

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch


class Supervised(Method):
    """Cross entropy with the labels that the run was given."""

    def loss_function(self, epoch: Epoch) -> LossFunction:
        """See the base class."""
        return self.cross_entropy(self.trainer.labels.to(self.trainer.ranks.device))
