"""What a run says first: what it trains on."""

import torch
from rich.console import Console
from torch import Tensor

from r2d2fast.data import Dataset, ResidentImages
from r2d2fast.data.photographs.tree import IMG_EXTENSIONS
from r2d2fast.tables import counted, say
from r2d2fast.train.config import Config
from r2d2fast.train.load_data import images_of_weights
from r2d2fast.train.recipes import IN_PYTHON, recipe_of
from r2d2fast.train.scaling import dropped

# More classes than these are told by the fewest and the most labels that one has.
NAMED = 12


def print_data(config: Config, dataset: Dataset, labels: Tensor, console: Console) -> None:
    """Print the classes with their labelled samples, how many samples are for what, and of a folder what is left out; then what
    may be a mistake. ``labels``: int64 ``[M]``, −1 for an unlabelled sample."""
    say(console, _classes(dataset, labels))
    labelled, tests = int((labels >= 0).sum()), len(dataset.test_labels)
    if dataset.held_out:
        tested = f"{tests} labelled ones held out to test on (--test-fraction changes how many)"
    else:
        tested = f"{tests or 'none'} to test on"
    say(console, f"{labelled} labelled samples, {len(labels) - labelled} unlabelled, {tested}")
    if dataset.ignored is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(dataset.ignored.items()))
        read = f"; read are {' '.join(IMG_EXTENSIONS)}"
        say(console, f"files that are ignored: {kinds}{read}" if kinds else "no file is ignored")
    for warning in dataset.warnings:
        say(console, f"warning: {warning}", "yellow")
    own = images_of_weights(config, dataset.train.shape[0])
    if isinstance(dataset.train, ResidentImages) and own is not None and own.shape != dataset.train.shape:
        sizes = [f"{width} x {height}" for _, height, width in (dataset.train.shape, own.shape)]
        say(
            console,
            f"--pretrained {config.pretrained}: images are normalised as those that the weights were made with, and stay "
            f"{sizes[0]} pixels large, where those had {sizes[1]}",
        )
    no_room = None if config.dataset == IN_PYTHON else dropped(recipe_of(config).config, config)
    if no_room is not None:
        say(console, no_room)


def _classes(dataset: Dataset, labels: Tensor) -> str:
    counts = torch.bincount(labels[labels >= 0], minlength=dataset.num_classes).tolist()
    head = f"{dataset.num_classes} classes"
    fewest, most = min(counts), max(counts)
    if fewest == most:
        return f"{head}, {counted(most, 'labelled sample')} of each"
    if len(counts) <= NAMED:
        each = ", ".join(f"{name} {count}" for name, count in zip(dataset.class_names, counts, strict=True))
        return f"{head}, labelled samples: {each}"
    names = [dataset.class_names[counts.index(count)] for count in (fewest, most)]
    return f"{head}, labelled samples of each: {fewest} ({names[0]}) to {most} ({names[1]})"
