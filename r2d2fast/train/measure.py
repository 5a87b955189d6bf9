"""How fast a configuration trains on this machine, from a few steps and images."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from r2d2fast.data import consecutive_batches
from r2d2fast.train.build import bank_file
from r2d2fast.train.callback import Callback
from r2d2fast.train.captured_steps import WARM_UP
from r2d2fast.train.config import Config
from r2d2fast.train.evaluation import EVALUATION_BATCH
from r2d2fast.train.load_data import load_data
from r2d2fast.train.methods.r2d2 import R2D2
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.schedule import Epoch, batch_size
from r2d2fast.train.threads import cpu_threads
from r2d2fast.train.trainer import Trainer

MEASURED_STEPS = 3
# Where whole steps would take a CPU longer than so many seconds, a step of a few images is measured, and others in proportion.
PATIENCE = 5.0
FEW = 4


def scratch_trainer(config: Config, ranks: Ranks) -> Trainer:
    """A trainer of ``config`` to measure with, which leaves nothing on the disk."""
    # The file itself can be the bank of a run that is still training.
    file = bank_file(config)
    scratch = config if file is None else replace(config, bank_storage=f"{file}.dry-run")
    trainer = Trainer(scratch, *load_data(scratch, ranks), ranks)
    if isinstance(trainer.method, R2D2) and isinstance(trainer.method.bank.storage, Path):
        trainer.method.bank.storage.unlink()  # it stays mapped
    return trainer


class Speed(NamedTuple):
    """What was measured, in seconds.

    Attributes:
        steps: of a training step, by stage.
        image: of an image evaluated, by all ranks together.
    """

    steps: dict[int, float]
    image: float

    def seconds(self, epochs: list[Epoch], test: int, unlabelled: int) -> float:
        """What ``epochs`` take: their steps, the ``test`` images at evaluations, the ``unlabelled`` ones at predictions."""
        images = sum(epoch.evaluates * test + epoch.predicts * unlabelled for epoch in epochs)
        return sum(epoch.steps * self.steps[epoch.stage] for epoch in epochs) + images * self.image

    def total(self, trainer: Trainer) -> float:
        """What the whole schedule of ``trainer`` takes."""
        return self.seconds(trainer.schedule, len(trainer.data.test), len(trainer.unlabelled))


def measure_speed(trainer: Trainer) -> Speed:
    """Measure a few steps of each stage, which change ``trainer``, and some images evaluated."""
    config, ranks = trainer.config, trainer.ranks
    first = [next(epoch for epoch in trainer.schedule if epoch.stage == stage) for stage in config.stages]
    with cpu_threads(trainer.threads):
        if ranks.device.type == "cpu" and not config.compile:
            sample = _seconds_per_sample(trainer)
            batches = {epoch.stage: min(batch_size(config, epoch.stage), _samples(trainer, epoch)) for epoch in first}
            steps = {stage: sample * batch / ranks.count for stage, batch in batches.items()}
            if ranks.any((MEASURED_STEPS + 1) * sum(steps.values()) > PATIENCE):
                return Speed(steps, _seconds_per_image(trainer, FEW) / ranks.count)
        image = _seconds_per_image(trainer, EVALUATION_BATCH) / ranks.count
        return Speed({epoch.stage: _seconds_per_step(trainer, epoch) for epoch in first}, image)


def _seconds_per_sample(trainer: Trainer) -> float:
    """Of a training step of a few samples: loading, forward and backward pass, after a first one."""
    images, few = trainer.data.train, FEW * trainer.config.bn_groups
    trainer.model.train()
    seconds = []
    began = time.perf_counter()
    for batch in images.batches(consecutive_batches(torch.arange(min(2 * few, len(images))), few), None, 0):
        with trainer.precision.autocast():
            loss = trainer.model(batch).sum()
        loss.backward()
        seconds.append((time.perf_counter() - began) / len(batch))
        began = time.perf_counter()
    trainer.optimizer.zero_grad()
    return seconds[-1]


def _samples(trainer: Trainer, epoch: Epoch) -> int:
    return len(trainer.labelled) if epoch.stage == 1 else len(trainer.labels)


def _seconds_per_step(trainer: Trainer, epoch: Epoch) -> float:
    """The median of a few steps, or of the replays of one that was captured."""
    trainer.go_to(trainer.schedule.index(epoch))
    trainer.callback = clock = _Clock()
    skipped = 0 if trainer.captured is None else WARM_UP + 1
    trainer.train(trainer.batches()[: skipped + MEASURED_STEPS + 1])
    seconds = [later - before for before, later in pairwise(clock.times)]
    steps = sorted(seconds[skipped:] or seconds)  # an epoch may have too few
    return steps[(len(steps) - 1) // 2]


class _Clock(Callback):
    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def between_steps(self, trainer: Trainer) -> None:
        _synchronize(trainer)
        self.times.append(time.perf_counter())


def _seconds_per_image(trainer: Trainer, count: int) -> float:
    images = trainer.data.test if len(trainer.data.test) else trainer.data.train
    samples = torch.arange(min(count, len(images)))
    seconds = []
    for _ in range(2):  # the first time memory is allocated
        began = time.perf_counter()
        for _ in trainer.evaluator.logits(images, samples):
            _synchronize(trainer)
        seconds.append(time.perf_counter() - began)
    return seconds[-1] / len(samples)


def _synchronize(trainer: Trainer) -> None:
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize()


def duration(seconds: float) -> str:
    """A time as people say it, rounded."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
