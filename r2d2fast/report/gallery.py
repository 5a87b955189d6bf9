"""Samples worth a look: those whose pseudo-labels changed most, and the wrong pseudo-labels of the highest confidence."""

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r2d2fast.data import Batch, DataError, Dataset, LoaderError
from r2d2fast.report.groups import Group
from r2d2fast.report.runs import Run
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.load_data import load_data
from r2d2fast.train.pseudo_labels import Moment, find_pseudo_labels, read_pseudo_labels
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES

SHOWN = 12
# Larger images are shrunk to this size, so that the page is small enough to be sent by mail.
LARGEST_SIDE = 96

# Settings that decide which images a run had, and of what size.
OF_THE_IMAGES = ("image_size", "resize", "test_fraction")

LoadImages = Callable[[Run], Dataset]


class Sample(NamedTuple):
    """One sample.

    Attributes:
        image: its PNG as a data URI.
        name: its name in the data set.
        truth: its true class, None where it is not known.
        history: the classes that it was given in turn, with their confidence.
        right: whether the last of them is the true one; None where that is not known.
    """

    image: str
    name: str
    truth: str | None
    history: str
    right: bool | None


@dataclass(frozen=True)
class Gallery:
    """The samples of one run that are worth a look.

    Attributes:
        run: the first finished run of the group, or its first.
        missing: why there is nothing to show; "" where there is something.
        summary: how many pseudo-labels changed and how many are wrong, in words.
        changed: from sure of one class to sure of another, the surest first.
        mistakes: the surest first.
    """

    run: Run
    missing: str = ""
    summary: str = ""
    changed: Sequence[Sample] = ()
    mistakes: Sequence[Sample] = ()


def image_loader(data_dir: Path) -> LoadImages:
    """A function that loads the data set of a run, each data set once. It raises ConfigError where files are missing."""

    @cache
    def load(name: str, **settings: Any) -> Dataset:
        if name not in RECIPES:
            raise DataError(f"the data set {name} is unknown here; known: {', '.join(RECIPES)}")
        # The recorded pseudo-labels say which samples are labelled, so the split does not matter: num_labels=0 needs no file.
        config = replace(
            RECIPES[name].config,
            **settings,
            data_dir=data_dir,
            num_labels=0,
            num_labels_per_class=(),
            split=0,
            workers=0,
            on_bad_image="skip",
        )
        return load_data(config, Ranks())[0]

    return lambda run: load(
        run.config["dataset"], **{name: run.config[name] for name in OF_THE_IMAGES if name in run.config}
    )


def make_gallery(group: Group, load: LoadImages) -> Gallery:
    """The gallery of the group's first finished run, or of its first."""
    run = (group.finished or group.runs)[0]
    if run.config["dataset"] == "embeddings":
        return Gallery(run, "No gallery: embeddings are no images.")
    # Stage 3 predicts anew, but the paper is about the pseudo-labels that stage 2 has learned.
    files = {moment: path for moment, path in find_pseudo_labels(run.directory).items() if moment.stage == 2}
    if not files:
        why = (
            "has recorded no pseudo-labels yet" if 2 in run.config["stages"] else "has no stage 2, so no pseudo-labels"
        )
        return Gallery(run, f"No gallery: {run.directory} {why}.")
    try:
        recorded = {moment: read_pseudo_labels(path) for moment, path in files.items()}
    except TrainingError as error:
        return Gallery(run, f"No gallery: {error}.")
    try:
        dataset = load(run)
        shape = (len(dataset.train), dataset.num_classes)
        if any(len(classes) != shape[0] or classes.max() >= shape[1] for classes, _ in recorded.values()):
            raise DataError(f"{shape[0]} training images of {shape[1]} classes are not those of {run.directory}")
        return _gallery(run, recorded, dataset)
    except (DataError, LoaderError, TrainingError) as error:
        return Gallery(run, f"No gallery: {error}. The report looks for data sets in --data-dir.")


def most_changed(first: tuple[np.ndarray, np.ndarray], last: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The samples that end with another class than they began with, ordered by the sum of both confidences.

    A sample that was sure of one class and became sure of another comes first. ``first`` and ``last`` are (classes,
    confidence) as recorded; the result is int64.
    """
    changed = np.flatnonzero(first[0] != last[0])
    return changed[np.argsort(-(first[1].astype(float) + last[1])[changed], kind="stable")]


def surest_mistakes(last: tuple[np.ndarray, np.ndarray], truth: np.ndarray) -> np.ndarray:
    """The unlabelled samples with a wrong pseudo-label, where the class is known (``truth`` ≥ 0), the surest first; int64."""
    wrong = np.flatnonzero((last[0] >= 0) & (truth >= 0) & (last[0] != truth))
    return wrong[np.argsort(-last[1].astype(float)[wrong], kind="stable")]


def _gallery(run: Run, recorded: dict[Moment, tuple[np.ndarray, np.ndarray]], dataset: Dataset) -> Gallery:
    truth = dataset.train_labels.numpy()
    moments = list(recorded)
    first, last = recorded[moments[0]], recorded[moments[-1]]
    changed, mistakes = most_changed(first, last), surest_mistakes(last, truth)
    shown = np.unique(np.concatenate([changed[:SHOWN], mistakes[:SHOWN]]))
    images = dict(zip(shown.tolist(), _images(dataset, shown), strict=True)) if len(shown) else {}

    def shown_sample(sample: int) -> Sample:
        known = truth[sample] >= 0
        return Sample(
            images[sample],
            dataset.train_names[sample],
            dataset.class_names[truth[sample]] if known else None,
            _history([(pair[0][sample], pair[1][sample]) for pair in recorded.values()], dataset.class_names),
            bool(last[0][sample] == truth[sample]) if known else None,
        )

    return Gallery(
        run,
        summary=_summary(moments[-1], first[0], last[0], truth, len(changed), len(mistakes)),
        changed=[shown_sample(sample) for sample in changed[:SHOWN].tolist()],
        mistakes=[shown_sample(sample) for sample in mistakes[:SHOWN].tolist()],
    )


def _summary(end: Moment, first: np.ndarray, last: np.ndarray, truth: np.ndarray, changed: int, wrong: int) -> str:
    unlabelled, known = last >= 0, truth >= 0
    after = f"{end.epochs} epoch{'s' * (end.epochs != 1)}"
    until = "the end of stage 2" if end.kind == "learned" else f"the prediction after {after} of stage 2"
    moves = known & (first != last)
    counts = {
        "from wrong to right": (moves & (last == truth)).sum(),
        "from right to wrong": (moves & (first == truth)).sum(),
        "from wrong to wrong": (moves & (first != truth) & (last != truth)).sum(),
    }
    told = f" ({', '.join(f'{count} {how}' for how, count in counts.items())})" if moves.any() else ""
    errors = f" {wrong} of {(unlabelled & known).sum()} are wrong then." if (unlabelled & known).any() else ""
    of_all = f"{changed} of {unlabelled.sum()} pseudo-labels changed their class"
    return f"{of_all} between the first prediction and {until}{told}.{errors}"


def _history(steps: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    """The classes in turn with their confidence: the first and the last confidence of a class that was kept for several steps."""
    told = []
    for label, kept in groupby(steps, key=lambda step: step[0]):
        percents = [f"{100 * confidence:.0f}" for _, confidence in kept]
        told.append(f"{names[label]} ({' … '.join(dict.fromkeys((percents[0], percents[-1])))} %)")
    return " → ".join(told)


def _images(dataset: Dataset, samples: np.ndarray) -> list[str]:
    """PNG files as data URIs. The normalised pixels are stretched to the range of bytes, all samples in the same way."""
    (batch,) = dataset.train.batches([Batch(torch.from_numpy(samples), None, len(samples))], None, 0)
    pixels: Tensor = batch.float()
    low, high = pixels.amin((0, 2, 3), keepdim=True), pixels.amax((0, 2, 3), keepdim=True)
    stretched = (255 * (pixels - low) / (high - low).clamp(min=1e-12)).round().byte().permute(0, 2, 3, 1).numpy()
    return [_data_uri(image) for image in stretched]


def _data_uri(pixels: np.ndarray) -> str:
    """The PNG file of uint8 ``[H, W, C]``; where the channels are not RGB, of the first one."""
    image = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
