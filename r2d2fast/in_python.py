"""Training from Python: what the command line does, with data that the program has."""

import csv
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from r2d2fast.data import Dataset
from r2d2fast.predict import TrainedRun, load_run
from r2d2fast.train.command import prepared
from r2d2fast.train.config import Config
from r2d2fast.train.labels import GIVEN, LABELS
from r2d2fast.train.load_data import labels_of, placed
from r2d2fast.train.run import run


class FinishedRun(NamedTuple):
    """What a run came to.

    Attributes:
        results: as in ``results.json``.
        names: M names of the training samples, in the order of the data set.
        classes: int64 ``[M]``, the number of each one's class, given or found; −1 for an image that could not be decoded.
        probabilities: float32 ``[M]``, of that class; 1 where it was given.
        given: bool ``[M]``, whether it was.
        network: the trained network, which predicts (:class:`r2d2fast.predict.TrainedRun`).
    """

    results: dict[str, Any]
    names: list[str]
    classes: np.ndarray
    probabilities: np.ndarray
    given: np.ndarray
    network: TrainedRun


def train_run(config: Config, dataset: Dataset | None = None, *, verbose: bool = True) -> FinishedRun:
    """Train as ``python -m r2d2fast.train`` would.

    Args:
        config: of :func:`r2d2fast.recipe_for`, perhaps changed by ``dataclasses.replace``. All files that the command writes are
            in its ``run_dir``, where a run goes on with ``resume``; without one nothing is left on the disk.
        dataset: of :func:`r2d2fast.dataset_from_arrays` or :func:`r2d2fast.dataset_from_torch`; None takes that which the
            configuration names.
        verbose: show progress.

    PyTorch's random numbers and settings are afterwards as they were. Under ``torchrun`` every process calls this.

    Raises TrainingError where the run cannot go on, ConfigError, one of them, for a configuration that does not fit.

    Example:
        >>> data = dataset_from_arrays(images, classes)
        >>> done = train_run(recipe_for(data, num_labels=40).config, data)
        >>> done.classes, done.network.predict(new_images).names
    """
    with ExitStack() as stack:
        config = replace(config, split=config.seed if config.split is None else config.split)
        ranks, console = stack.enter_context(prepared(config))
        stack.enter_context(torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []))
        directory = config.run_dir or ranks.on_first(lambda: Path(stack.enter_context(TemporaryDirectory())) / "run")
        data = None
        if dataset is not None:
            own = placed(dataset, config, ranks)
            data = own, labels_of(config, own)
        results = run(config, directory, console if verbose else Console(quiet=True), ranks, data)
        network = load_run(directory, config.device)
        with open(directory / LABELS, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file))
        ranks.barrier()  # before the first one removes a directory that was made for this run
    numbers = {name: number for number, name in enumerate(network.class_names)}
    return FinishedRun(
        results,
        [row["name"] for row in rows],
        np.array([numbers.get(row["class"], -1) for row in rows]),
        np.array([float(row["probability"] or "nan") for row in rows], np.float32),
        np.array([row["origin"] == GIVEN for row in rows]),
        network,
    )
