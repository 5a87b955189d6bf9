"""The class of every training sample, which is what a run with few labels is made for: ``labels.csv``."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from r2d2fast.files import replacing
from r2d2fast.tables import csv_rows, probability
from r2d2fast.train.errors import DIVERGED, DivergenceError
from r2d2fast.train.evaluation import EVALUATION_BATCH, Evaluator, most_probable
from r2d2fast.train.files import writing
from r2d2fast.train.trainer import Trainer

LABELS = "labels.csv"
HEADER = ("name", "class", "probability", "origin")
GIVEN, PSEUDO_LABEL, BAD_IMAGE = "given", "pseudo-label", "bad image"
# Rows between two moments at which the ranks put together what they have predicted; memory does not grow with the data set.
ROWS = 128 * EVALUATION_BATCH


def write_labels(trainer: Trainer, directory: Path, console: Console) -> None:
    """Write ``labels.csv``: name, class, probability and origin of every training sample, in the order of the data set.

    Origin ``given``: the label that the run was given, with probability 1. ``pseudo-label``: a last reprediction, by the network
    with which the run ends, in eval mode and without augmentation; the probability is its softmax. So ``python -m
    r2d2fast.predict`` says the same of the same sample, whichever stages were run. (The bank's pseudo-logits are older: stage 3
    fine-tunes on them.) ``bad image``: one that cannot be decoded, under ``--on-bad-image skip``; it has neither class nor
    probability.

    UTF-8, commas between cells, quotes where a name needs them. Every rank calls this, and predicts its part. Raises
    TrainingError, on every rank, where the file cannot be written or logits are not finite; an old one is untouched then.
    """
    path, ranks = directory / LABELS, trainer.ranks
    # Not the trainer's own, between whose batches a checkpoint may be written.
    evaluator = Evaluator(trainer.model, trainer.precision, ranks, lambda: None)
    count = len(trainer.labels)
    with ExitStack() as stack:
        files: list[BinaryIO] = []  # of rank 0

        def begin() -> None:
            with writing(path):
                files.append(stack.enter_context(replacing(path)))
                files[0].write(csv_rows([HEADER]))

        def write(block: Tensor, classes: Tensor, probabilities: Tensor) -> None:
            with writing(path):
                files[0].write(csv_rows(_rows(trainer, block, classes, probabilities)))

        def end() -> None:
            with writing(path):
                stack.close()

        ranks.on_first(begin)
        starts = range(0, count, ROWS)
        for start in track(starts, "labels", console=console, transient=True, disable=not console.is_terminal):
            block = torch.arange(start, min(start + ROWS, count))
            predicted = _predict(trainer, evaluator, block)
            ranks.on_first(lambda block=block, predicted=predicted: write(block, *predicted))  # type: ignore[misc]
        ranks.on_first(end)


def _predict(trainer: Trainer, evaluator: Evaluator, block: Tensor) -> tuple[Tensor, Tensor]:
    """Class and probability of the samples ``block``, which follow each other: int64 and float32 ``[b]``, on the CPU.

    The same on every rank; class −1 of an image that cannot be decoded. Raises DivergenceError where logits are not finite.
    """
    ranks, images = trainer.ranks, trainer.data.train
    labels = trainer.labels[block]
    unlabelled = block[labels < 0]
    own = unlabelled[ranks.part(len(unlabelled))]
    classes = torch.zeros(len(block), dtype=torch.int64, device=ranks.device)
    probabilities = torch.zeros(len(block), device=ranks.device)
    for samples, logits in evaluator.logits(images, own):
        place = (samples - block[0]).to(ranks.device)
        classes[place], probabilities[place] = most_probable(logits)
    if images.bad_images:
        names = trainer.data.train_names
        bad = [sample for sample in own.tolist() if names[sample] in images.bad_images]
        classes[torch.tensor(bad, dtype=torch.int64, device=ranks.device) - int(block[0])] = -1
    classes, probabilities = ranks.sum_(classes).cpu(), ranks.sum_(probabilities).cpu()
    if not torch.isfinite(probabilities).all():
        raise DivergenceError(f"the network's logits are not finite; {DIVERGED}")
    return torch.where(labels < 0, classes, labels), torch.where(labels < 0, probabilities, 1.0)


def _rows(trainer: Trainer, block: Tensor, classes: Tensor, probabilities: Tensor) -> Iterator[tuple[str, ...]]:
    names, class_names = trainer.data.train_names, trainer.data.class_names
    given = (trainer.labels[block] >= 0).tolist()
    for sample, known, number, value in zip(
        block.tolist(), given, classes.tolist(), probabilities.tolist(), strict=True
    ):
        if number < 0:
            yield names[sample], "", "", BAD_IMAGE
        else:
            yield names[sample], class_names[number], probability(value), GIVEN if known else PSEUDO_LABEL
