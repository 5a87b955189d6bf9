"""Which classes the run gave its unlabelled samples, a small file each time that it gave them anew; the report reads them."""

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r2d2fast.train.errors import TrainingError
from r2d2fast.train.files import write_atomically, writing
from r2d2fast.train.trainer import Trainer

PSEUDO_LABELS = "pseudo_labels"


class Moment(NamedTuple):
    """When pseudo-labels were recorded. Moments of one run sort by time.

    Attributes:
        stage: 2 or 3.
        epochs: of the stage, done before.
        kind: ``predicted``, the network's prediction, which the bank then starts from; ``learned``, the outcome of stage 2.
    """

    stage: int
    epochs: int
    kind: str


def save_pseudo_labels(trainer: Trainer, directory: Path, moment: Moment) -> None:
    """Write ``pseudo_labels/stageS-EEEEE-KIND.npz`` in the run directory; every rank calls this. Nothing of a method
    that learns none.

    ``classes``, int32 ``[M]``: argmax of the pseudo-label, −1 for a labelled sample; ``confidence``, float16 ``[M]``: its largest
    probability. Raises TrainingError where it cannot be written.
    """
    pseudo_labels = trainer.method.pseudo_labels()
    if pseudo_labels is None:
        return
    classes, confidence = pseudo_labels[0].cpu().int(), pseudo_labels[1].cpu().half()
    classes[trainer.labelled] = -1
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classes=classes.numpy(), confidence=confidence.numpy())
    path = directory / PSEUDO_LABELS / f"stage{moment.stage}-{moment.epochs:05d}-{moment.kind}.npz"

    def write() -> None:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())

    trainer.ranks.on_first(write)


def find_pseudo_labels(directory: Path) -> dict[Moment, Path]:
    """The files of a run directory, in the order of time."""
    found = {}
    for path in (directory / PSEUDO_LABELS).glob("*.npz"):
        if match := re.fullmatch(r"stage(\d+)-(\d+)-(predicted|learned)", path.stem):
            found[Moment(int(match[1]), int(match[2]), match[3])] = path
    return dict(sorted(found.items()))


def read_pseudo_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``classes`` and ``confidence``, as :func:`save_pseudo_labels` says. Raises TrainingError for a file that is no such one."""
    try:
        with np.load(path) as arrays:
            classes, confidence = arrays["classes"], arrays["confidence"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TrainingError(f"{path} cannot be read ({error}): restore it, or remove it") from error
    if classes.shape != confidence.shape or classes.ndim != 1:
        raise TrainingError(f"{path} is damaged: shapes {classes.shape} and {confidence.shape}; restore or remove it")
    return classes, confidence
