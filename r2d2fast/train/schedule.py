"""What happens at which epoch, as data: a list of epochs, each with its stage, learning rate and reprediction."""

import math
from dataclasses import dataclass, replace

from r2d2fast.data import mixed_steps, shuffled_steps
from r2d2fast.train.config import Config
from r2d2fast.train.methods import METHODS


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run.

    Attributes:
        stage: 1, 2 or 3.
        epoch: number within the stage, from 0.
        steps: optimizer steps.
        peak_lr: learning rate of a constant schedule, or at the start of a cosine.
        cosine_epochs: epochs after which the cosine reaches zero; None for a constant learning rate.
        cosine_start: number of the epoch with which the cosine begins.
        predicts: whether the network predicts all pseudo-logits before this epoch.
        last: whether the stage ends with this epoch.
        evaluates: whether the test error is measured after it.
    """

    stage: int
    epoch: int
    steps: int
    peak_lr: float
    cosine_epochs: int | None
    cosine_start: int
    predicts: bool
    last: bool
    evaluates: bool = True

    @property
    def repredicts(self) -> bool:
        """Whether this epoch begins with one of R2's repredictions: a prediction inside stage 2."""
        return self.stage == 2 and self.epoch > 0 and self.predicts

    def lr(self, step: int) -> float:
        """Learning rate of one step: peak·½(1 + cos(πt / cosine_epochs)), t in fractional epochs from the cosine's start."""
        if self.cosine_epochs is None:
            return self.peak_lr
        t = self.epoch - self.cosine_start + step / self.steps
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * t / self.cosine_epochs))


def batch_size(config: Config, stage: int) -> int:
    """Samples of a batch, of all ranks together."""
    if stage == 2:
        return config.stage2.unlabelled_batch + config.stage2.labelled_batch
    return config.stage1.batch if stage == 1 else config.stage3.batch


def make_schedule(config: Config, labelled: int, unlabelled: int, ranks: int = 1, test: int = 0) -> list[Epoch]:
    """All epochs of the run, in order, for so many labelled, unlabelled and test samples; ``config`` has been checked.

    The test error is measured when the network has been trained on as many images as there are to test on since the last time, at
    the end of a stage, and before a reprediction: with 1000 labels an epoch takes 0.1 s, and 10 000 test images 0.7 s.
    """
    one, two, three = config.stage1, config.stage2, config.stage3
    schedule = []
    if 1 in config.stages:
        for e in range(one.epochs):
            steps = shuffled_steps(labelled, one.batch, ranks)
            schedule.append(Epoch(1, e, steps, one.lr, one.cosine_epochs, 0, False, e == one.epochs - 1))
    if 2 in config.stages:
        for e in range(two.epochs):
            predicts = METHODS[config.method].predicts and (e == 0 or (two.repredict and e in two.repredict_epochs))
            phase = sum(e >= start for start in two.repredict_epochs)
            start, end = (0, *two.repredict_epochs, two.epochs)[phase : phase + 2]
            cosine: tuple[int | None, int] = (end - start, start) if two.lr_schedule == "cosine" else (None, 0)
            steps = mixed_steps(unlabelled, two.unlabelled_batch, ranks)
            schedule.append(Epoch(2, e, steps, two.lrs[phase], *cosine, predicts, e == two.epochs - 1))
    if 3 in config.stages:
        for e in range(three.epochs):
            predicts = e == 0 and three.hard_labels == "repredict"
            steps = shuffled_steps(labelled + unlabelled, three.batch, ranks)
            schedule.append(Epoch(3, e, steps, three.lr, three.epochs, 0, predicts, e == three.epochs - 1))
    trained = 0
    for number, epoch in enumerate(schedule):
        trained += images_seen(config, [epoch], labelled, unlabelled)
        ends_phase = epoch.stage == 2 and epoch.epoch + 1 in two.repredict_epochs
        schedule[number] = replace(epoch, evaluates=trained >= test or epoch.last or ends_phase)
        trained *= not schedule[number].evaluates
    return schedule


def images_seen(config: Config, epochs: list[Epoch], labelled: int, unlabelled: int) -> int:
    """On how many images the network is trained in ``epochs``, for so many samples: a second view is one more, and a pass without
    a gradient of the weights is none. So the numbers of methods can be compared."""
    two, samples = config.stage2, {1: labelled, 3: labelled + unlabelled}
    mixed = METHODS[config.method].passes * two.unlabelled_batch + two.labelled_batch
    return sum(
        epoch.steps * mixed
        if epoch.stage == 2
        else min(epoch.steps * batch_size(config, epoch.stage), samples[epoch.stage])
        for epoch in epochs
    )
