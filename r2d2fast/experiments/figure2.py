"""Figure 2 of the paper: the two features of every training image after stage 1, and after D2."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r2d2fast.data import Dataset, consecutive_batches
from r2d2fast.experiments.runs import Run
from r2d2fast.models import make_model
from r2d2fast.models.lenet import LeNet2D
from r2d2fast.train.files import write_atomically
from r2d2fast.train.load_data import load_data
from r2d2fast.train.pictures import save_picture
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.run_directory import NETWORK

BATCH = 512
PANELS = ("labelled samples", "all samples")


def draw_figure2(stage1: Run, d2: Run, directory: Path, ranks: Ranks) -> Path:
    """Write ``figure2.png`` into ``directory``, and what it shows as ``figure2.npz``; returns the picture's path.

    The arrays, for M training images: ``stage1`` and ``d2``, float32 ``[M, 2]``, the features in eval mode without augmentation;
    ``classes``, int64 ``[M]``, the true ones, −1 where nobody knows; ``labelled``, bool ``[M]``. Raises TrainingError where
    something cannot be read or written.
    """
    # The files are there by now; a download would wait for the other ranks, which do not come here.
    dataset, labels = load_data(replace(d2.config, download=False), ranks)
    features = {"stage 1": _features(stage1, dataset, ranks), "D2": _features(d2, dataset, ranks)}
    classes, labelled = dataset.train_labels.numpy(), (labels >= 0).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, stage1=features["stage 1"], d2=features["D2"], classes=classes, labelled=labelled)
    write_atomically(directory / "figure2.npz", buffer.getvalue())
    path = directory / "figure2.png"
    save_picture(four_panels(features, classes, labelled, dataset.class_names), path)
    return path


@torch.no_grad()
def _features(run: Run, dataset: Dataset, ranks: Ranks) -> np.ndarray:
    channels, side, _ = dataset.train.shape
    model = make_model("lenet2d", dataset.num_classes, channels, side, pretrained=run.directory / NETWORK)
    assert isinstance(model, LeNet2D)
    model.to(ranks.device).eval()
    order = consecutive_batches(torch.arange(len(dataset.train)), BATCH)
    return torch.cat([model.features(images).cpu() for images in dataset.train.batches(order, None, 0)]).numpy()


def four_panels(
    features: dict[str, np.ndarray], classes: np.ndarray, labelled: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """The figure: a row for each entry of ``features``, ``[M, 2]``, labelled samples on the left and all on the right."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    # A scale for each network, because the features of two networks have nothing in common.
    axes = figure.subplots(2, 2, sharex="row", sharey="row")
    for row, (title, points) in zip(axes, features.items(), strict=True):
        for axis, shown, panel in zip(row, (labelled, np.ones_like(labelled)), PANELS, strict=True):
            _scatter(axis, points[shown], classes[shown], class_names)
            axis.set_title(f"after {title}: {panel}")
    return figure


def _scatter(axis: Axes, points: np.ndarray, classes: np.ndarray, class_names: Sequence[str]) -> None:
    size = 20 if len(points) < 2000 else 2
    colours = colormaps["tab10" if len(class_names) <= 10 else "turbo"]
    for number in np.unique(classes):
        x, y = points[classes == number].T
        if number < 0:
            axis.scatter(x, y, s=size, color="lightgrey", linewidths=0, zorder=1)
            continue
        place = number if len(class_names) <= 10 else number / (len(class_names) - 1)
        axis.scatter(x, y, s=size, color=colours(place), linewidths=0, zorder=2)
        # The names of the classes, too, for those who cannot tell the colours apart.
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
        name, middle = class_names[number], (float(np.median(x)), float(np.median(y)))
        axis.text(*middle, name, ha="center", va="center", fontweight="bold", bbox=box, zorder=3)
    axis.set(xlabel="feature 1", ylabel="feature 2")
    axis.grid(alpha=0.3)
