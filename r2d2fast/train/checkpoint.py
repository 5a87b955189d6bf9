"""Checkpoints that survive a crash, a full disk and a damaged file, written by any number of ranks and read by any other.

A checkpoint is a directory: the tensors as torch.distributed.checkpoint writes them, each rank its part; the other values as
JSON; and a manifest with the digest of every file.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from r2d2fast.files import sync_directory
from r2d2fast.tables import counted
from r2d2fast.train import state
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.files import CURRENT, PREVIOUS, said_of_checkpoints, write_atomically, writing
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.trainer import Trainer

TEMPORARY = "checkpoint.tmp"
VALUES = "values.json"
MANIFEST = "manifest.json"

# Epochs after the last checkpoint are computed again on resuming, to the same bits. Stage 1's epochs can be far shorter than
# it takes to sync a checkpoint to the disk: between two there is so much time, and as many times that of writing one.
SECONDS_BETWEEN_CHECKPOINTS = 2.0
CHECKPOINT_SHARE = 20


class Checkpoints:
    """When a run saves, and what it has saved last.

    Args:
        directory: of the run.
        epochs: done in the last checkpoint, if any.
        minutes: between checkpoints within an epoch.
    """

    def __init__(self, directory: Path, epochs: int, minutes: float) -> None:
        self.directory = directory
        self.epochs = epochs
        self.minutes = minutes
        self.at, self.took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time for one at the end of an epoch."""
        return time.monotonic() - self.at >= max(SECONDS_BETWEEN_CHECKPOINTS, CHECKPOINT_SHARE * self.took)

    def due_within_an_epoch(self) -> bool:
        """Whether it is time for one though the epoch goes on."""
        return time.monotonic() - self.at >= 60 * self.minutes

    def save(self, trainer: Trainer) -> None:
        """Write the trainer's state; every rank calls this. Raises TrainingError where it cannot be written."""
        began = self.at = time.monotonic()
        values = state.values(trainer)
        # Within an epoch nobody may have looked at the losses yet. The next look stops the run; the checkpoint stays good.
        if all(map(math.isfinite, values["losses"])):
            save_checkpoint(self.directory, state.tensors(trainer), values, trainer.ranks)
            self.at, self.epochs = time.monotonic(), trainer.position.epoch
            self.took = self.at - began

    def last(self) -> str:
        """A sentence that names the last checkpoint."""
        if not (self.directory / CURRENT).exists():
            return "There is no checkpoint yet."
        return f"The last good checkpoint, after {counted(self.epochs, 'epoch')}, is {self.directory / CURRENT}."


def save_checkpoint(directory: Path, tensors: dict[str, Any], values: dict[str, Any], ranks: Ranks) -> None:
    """Write a state as the current checkpoint; the one before it is kept.

    Every rank calls this, with tensors that are the same on all of them or DTensors, and values of which rank 0's are kept.
    Raises TrainingError, on every rank, where it cannot be written, on a full disk for example; the checkpoints before it stay
    good.
    """
    temporary, problem = directory / TEMPORARY, None
    try:
        with writing(directory):
            ranks.on_first(lambda: _make_anew(temporary))
            planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # rank 0 has the buffers that count
            with _quietly(ranks) as options:
                dcp.save(tensors, checkpoint_id=temporary, planner=planner, **options)
            if ranks.rank == 0:
                _finish(directory, values)
    except TrainingError as error:
        problem = error
    except CheckpointException as error:
        # PyTorch's own writer does not say that a disk is full, but that it is at an unexpected position.
        problem = TrainingError(
            f"cannot write {temporary}: {_reason(error)}. Is the disk full? Free some space, or name another --run-dir. "
            + said_of_checkpoints(temporary)
        )
    if ranks.any(problem is not None):
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise problem or TrainingError("another rank could not write its part of the checkpoint")


def _make_anew(temporary: Path) -> None:
    with writing(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()


def _finish(directory: Path, values: dict[str, Any]) -> None:
    temporary, current, previous = (directory / name for name in (TEMPORARY, CURRENT, PREVIOUS))
    write_atomically(temporary / VALUES, json.dumps(values).encode())
    digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    write_atomically(temporary / MANIFEST, json.dumps(digests).encode())
    # The current one goes out of the way only when the next is on the disk, digests and all.
    if current.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(current, previous)
    os.replace(temporary, current)
    sync_directory(directory)


def find_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint in ``directory``, and a message for each bad one, damaged or unreadable, that was passed over.

    None if there is no checkpoint yet. Raises TrainingError if there are checkpoints and none is good.
    """
    messages: list[str] = []
    for name in (CURRENT, PREVIOUS):
        path = directory / name
        if not path.exists():
            continue
        problem = _problem(path)
        if problem is not None:
            messages.append(f"the checkpoint {path} {problem}")
            continue
        if messages:
            messages.append(f"going on from the one before it, {name}")
        return path, messages
    if messages:
        raise TrainingError(
            f"{'; '.join(messages)}. No good checkpoint is left: restore one, or remove {directory} and start again."
        )
    return None, []


def read_values(checkpoint: Path) -> dict[str, Any]:
    """The values of a good checkpoint."""
    return json.loads((checkpoint / VALUES).read_bytes())


def load_tensors(checkpoint: Path, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Read the tensors of a good checkpoint into ``tensors``, in place; every rank calls this.

    Raises TrainingError if they do not fit. PyTorch unpickles the list of tensors: load no checkpoint of somebody whom you do
    not trust.
    """
    try:
        with _quietly(ranks) as options:
            dcp.load(tensors, checkpoint_id=checkpoint, **options)
    except CheckpointException as error:
        raise TrainingError(f"the checkpoint {checkpoint} does not fit this run: {_reason(error)}") from error


def keep_good(checkpoint: Path) -> None:
    """Give ``checkpoint`` the name of the current one, or the next save would keep a bad one in its place."""
    current = checkpoint.with_name(CURRENT)
    if checkpoint != current:
        with writing(current):
            shutil.rmtree(current, ignore_errors=True)
            os.replace(checkpoint, current)


def _problem(checkpoint: Path) -> str | None:
    try:
        digests = json.loads((checkpoint / MANIFEST).read_bytes())
        found = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
        if missing := sorted(digests.keys() - found):
            return f"lacks {', '.join(missing)}"
        # The digests, because a file with a flipped bit can still load, with wrong tensors.
        wrong = [name for name, digest in digests.items() if _digest(checkpoint / name) != digest]
        return f"is damaged: {', '.join(wrong)} do not fit their checksums" if wrong else None
    except OSError as error:
        return f"cannot be read: {error.strerror} ({error.filename})"
    except (ValueError, AttributeError):
        return f"is damaged: {MANIFEST} cannot be read as JSON"


def _reason(error: CheckpointException) -> str:
    """The first rank's own error, in one line."""
    failure = next(iter(error.failures.values()))[0]
    return (str(failure).splitlines() or [type(failure).__name__])[0]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):  # hashlib.file_digest() is of Python 3.11
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _quietly(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Arguments for torch.distributed.checkpoint, which warns a single process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"no_dist": ranks.count == 1}
