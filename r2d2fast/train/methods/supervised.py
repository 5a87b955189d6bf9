"""Learning from the labelled samples alone: a method by itself, and stage 1 of every other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r2d2fast.train.methods.method import LossFunction, Method

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch


class Supervised(Method):
    """Cross entropy with the labels that the run was given."""

    stages = ((1,),)
    capturable = True

    def loss_function(self, epoch: Epoch) -> LossFunction:
        """See the base class."""
        return self.cross_entropy(self.labels)
