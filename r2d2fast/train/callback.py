"""What happens between the steps of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch
    from r2d2fast.train.trainer import Trainer


class Callback:
    """What a trainer calls between its steps. This one does nothing, which is all that training in memory needs; a run in a
    directory has a :class:`r2d2fast.train.run_callback.RunCallback`."""

    def between_steps(self, trainer: Trainer) -> None:
        """Called after every training step and after every batch that is predicted or evaluated.

        The trainer's state may be saved here. If this raises, another trainer can go on from the state saved.
        """

    def predicted(self, trainer: Trainer) -> None:
        """Called after a prediction, before the first step changes what it gave the bank."""

    def epoch_ended(self, trainer: Trainer, epoch: Epoch, metrics: dict[str, Any]) -> None:
        """Called after an epoch, when ``metrics`` have been added to the trainer's history and its position is the next epoch."""
