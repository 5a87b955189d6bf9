"""What happens at which epoch, as data: a list of epochs, each with its stage, learning rate and reprediction."""

import math
from dataclasses import dataclass

from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run.

    Attributes:
        stage: 1, 2 or 3.
        epoch: number within the stage, from 0.
        steps: optimizer steps.
        peak_lr: learning rate of a constant schedule, or at the start of a cosine.
        cosine_epochs: epochs after which the cosine reaches zero; None for a constant learning rate.
        predicts: whether the network predicts all pseudo-logits before this epoch.
        last: whether the stage ends with this epoch.
    """

    stage: int
    epoch: int
    steps: int
    peak_lr: float
    cosine_epochs: int | None
    predicts: bool
    last: bool

    @property
    def repredicts(self) -> bool:
        """Whether this epoch begins with one of R2's repredictions: a prediction inside stage 2."""
        return self.stage == 2 and self.epoch > 0 and self.predicts

    def lr(self, step: int) -> float:
        """Learning rate of one step: peak·½(1 + cos(πt / cosine_epochs)), t in fractional epochs."""
        if self.cosine_epochs is None:
            return self.peak_lr
        t = self.epoch + step / self.steps
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * t / self.cosine_epochs))


def make_schedule(config: Config, labelled: int, unlabelled: int) -> list[Epoch]:
    """All epochs of the run, in order, for so many labelled and unlabelled samples.

    Raises ConfigError for numbers that make no schedule.
    """
    _check(config, unlabelled)
    one, two, three = config.stage1, config.stage2, config.stage3
    stages: dict[int, list[Epoch]] = {1: [], 2: [], 3: []}
    for e in range(one.epochs):
        steps = math.ceil(labelled / one.batch)
        stages[1].append(Epoch(1, e, steps, one.lr, one.cosine_epochs, False, e == one.epochs - 1))
    for e in range(two.epochs):
        predicts = e == 0 or e in two.repredict_epochs
        lr = two.lrs[sum(e >= start for start in two.repredict_epochs)]
        stages[2].append(Epoch(2, e, unlabelled // two.unlabelled_batch, lr, None, predicts, e == two.epochs - 1))
    for e in range(three.epochs):
        predicts = e == 0 and three.hard_labels == "repredict"
        steps = math.ceil((labelled + unlabelled) / three.batch)
        stages[3].append(Epoch(3, e, steps, three.lr, three.epochs, predicts, e == three.epochs - 1))
    return [epoch for stage in config.stages for epoch in stages[stage]]


def _check(config: Config, unlabelled: int) -> None:
    one, two, three = config.stage1, config.stage2, config.stage3
    if config.stages not in ((1,), (1, 2), (1, 2, 3)):
        asked = ",".join(map(str, config.stages))
        raise ConfigError(f"--stages {asked}: accepted are 1, 1,2 and 1,2,3; each stage starts from the one before")
    at_least_one = {
        "--stage1.epochs": one.epochs,
        "--stage1.batch": one.batch,
        "--stage2.epochs": two.epochs,
        "--stage2.unlabelled-batch": two.unlabelled_batch,
        "--stage2.labelled-batch": two.labelled_batch,
        "--stage3.epochs": three.epochs,
        "--stage3.batch": three.batch,
    }
    for flag, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1; leave a whole stage out with --stages")
    if one.cosine_epochs < one.epochs:
        raise ConfigError(
            f"--stage1.cosine-epochs {one.cosine_epochs}: must be at least --stage1.epochs, {one.epochs}, "
            "or the learning rate would rise again"
        )
    if two.unlabelled_batch > unlabelled:
        raise ConfigError(
            f"--stage2.unlabelled-batch {two.unlabelled_batch}: there are only {unlabelled} unlabelled samples"
        )
    starts = two.repredict_epochs
    if list(starts) != sorted(set(starts)) or any(not 0 < start < two.epochs for start in starts):
        raise ConfigError(
            f"--stage2.repredict-epochs {','.join(map(str, starts))}: must rise, and lie between 1 and "
            f"{two.epochs - 1}, the last of the {two.epochs} epochs of --stage2.epochs"
        )
    if len(two.lrs) != len(starts) + 1:
        raise ConfigError(
            f"--stage2.lrs {','.join(map(str, two.lrs))}: {len(two.lrs)} learning rates, {len(starts)} repredictions; "
            f"needed are {len(starts) + 1} learning rates, one before the first reprediction and one from each on"
        )
