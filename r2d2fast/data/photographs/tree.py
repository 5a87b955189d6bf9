"""Folders of image files: which images there are, and their classes."""

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from r2d2fast.command import as_called
from r2d2fast.data.class_names import means_unlabelled, similar_names
from r2d2fast.data.errors import DataError
from r2d2fast.data.label_file import LABEL_FILE, read_labels
from r2d2fast.data.names import Names
from r2d2fast.data.photographs.images import Files, FolderFiles
from r2d2fast.data.split import check_test_fraction
from r2d2fast.image_options import TEST_FRACTION

TRAIN = "train"
# The first that is there: ImageNet's own test/ has no labels.
TESTS = ("val", "test")
LAYOUTS = f"""accepted:
  DIR/{TRAIN}/CLASS/*.jpg and DIR/{TESTS[0]}/CLASS/*.jpg (or {TESTS[1]}), a folder for each class;
  DIR/CLASS/*.jpg: of the labelled images, --test-fraction are held out to test on;
  DIR/*.jpg with DIR/{LABEL_FILE}, lines 'FILENAME CLASS' or 'FILENAME,CLASS'; images without a line are unlabelled.
    {TRAIN}/ and {TESTS[0]}/ can have the same form;
  what {as_called("pack")} has written.
Endings: {" ".join(IMG_EXTENSIONS)}"""


@dataclass(frozen=True)
class Part:
    """Training or test images: ``labels`` is int64 ``[M]``, −1 for unknown."""

    files: Files
    labels: Tensor


@dataclass(frozen=True)
class Tree:
    """The images of a data set, encoded.

    Attributes:
        class_names: N names.
        train, test: the images; there may be none to test on.
        held_out: how many labelled images were taken from the others for ``test``, since there is no part for tests.
        ignored: how many files were left out, by what they are.
        warnings: sentences on what may be a mistake.
    """

    class_names: Sequence[str]
    train: Part
    test: Part
    held_out: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def read_tree(root: Path, test_fraction: float = TEST_FRACTION) -> Tree:
    """The images below ``root`` in one of the layouts of :data:`LAYOUTS`, in the order of their names.

    Classes are numbered in the order of their names, by value if they are whole numbers. Files and folders whose names begin with
    a dot are left out. Raises DataError if there is no such layout, naming what is wrong.

    Args:
        root: the folder.
        test_fraction: of the labelled images of each class, the share that is kept for tests where there is no part for them,
            at least one of a class of two or more; 0 for none.
    """
    check_test_fraction(test_fraction)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name that of the images, in training by --data-dir; {LAYOUTS}")
    ignored: Counter[str] = Counter()
    warnings: list[str] = []
    test_directory = next((root / name for name in TESTS if (root / name).is_dir()), None)
    if (root / TRAIN).is_dir():
        train = _classes_by_name(root / TRAIN, ignored, warnings)
        warnings += _beside(root, test_directory)
        if test_directory is not None:
            test = _classes_by_name(test_directory, ignored, warnings)
            _check_test_classes(train, test, test_directory)
        elif test_fraction:
            raise DataError(
                f"{root} has {TRAIN}/ but neither {' nor '.join(TESTS)}/; add one of them, or --test-fraction 0 to go without "
                f"test images; {LAYOUTS}"
            )
        else:
            test = {}
        directories = root / TRAIN, test_directory or root
        held_out = 0
    else:
        train, test = _hold_out(_classes_by_name(root, ignored, warnings), test_fraction)
        directories = root, root
        held_out = len(test)
    class_names = sorted({name for name in train.values() if name is not None}, key=_class_order)
    if len(class_names) < 2:
        raise DataError(
            f"{directories[0]} has labelled images of {len(class_names)} classes, at least 2 are needed; {LAYOUTS}"
        )
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(class_names)} | {None: -1}
    train_part, test_part = (
        Part(FolderFiles(directory, Names.of(classes)), _int64(numbers[name] for name in classes.values()))
        for directory, classes in zip(directories, (train, test), strict=True)
    )
    counts = Counter(label for label in (*train.values(), *test.values()) if label is not None)
    return Tree(class_names, train_part, test_part, held_out, ignored, [*warnings, *similar_names(counts)])


def _int64(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _beside(root: Path, test_directory: Path | None) -> Iterator[str]:
    """A sentence on a folder of unlabelled images, or of tests, that is not among those for training and tests."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and path != test_directory and (path.name in TESTS or means_unlabelled(path.name)):
            why = (
                f"the test images are those of {test_directory.name}/"
                if test_directory and path.name in TESTS
                else (f"move it into {TRAIN}/ if its images are to be labelled")
            )
            yield f"{path} is not looked at: {why}"


def _classes_by_name(directory: Path, ignored: Counter[str], warnings: list[str]) -> dict[str, str | None]:
    """The class of each image below ``directory``, None if it has none; sorted by name. Adds to the last two."""
    names = []
    for name in _files(directory):
        kind = _ignored_as(name)
        if kind is None:
            names.append(name)
        elif name != LABEL_FILE:
            ignored[kind] += 1
    names.sort()
    if not names:
        others = ", ".join(f"{count} {kind}" for kind, count in ignored.items())
        raise DataError(f"{directory} has no images{others and f', but {others}'}; {LAYOUTS}")
    if (directory / LABEL_FILE).is_file():
        labelled = read_labels(directory / LABEL_FILE, names)
        return {name: labelled.get(name) for name in names}
    beside = [name for name in names if "/" not in name]
    if beside:
        raise DataError(
            f"{directory} has images outside class folders, the first {beside[0]!r}, and no {LABEL_FILE} that gives their "
            f"classes; {LAYOUTS}"
        )
    folders = sorted({name.partition("/")[0] for name in names})
    unlabelled = {folder for folder in folders if means_unlabelled(folder)}
    warnings += [
        f"{directory / folder} is taken for unlabelled images, as its name says; if it is a class, rename it"
        for folder in folders
        if folder in unlabelled
    ]
    return {name: folder if folder not in unlabelled else None for name in names for folder in [name.partition("/")[0]]}


def image_names(directory: Path) -> Iterator[str]:
    """The paths of all image files below ``directory``, in it, with forward slashes."""
    return (name for name in _files(directory) if _ignored_as(name) is None)


def _ignored_as(name: str) -> str | None:
    """What a file is that is not taken, in one word; None for an image."""
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return "hidden"
    return None if base.lower().endswith(IMG_EXTENSIONS) else os.path.splitext(base)[1].lower() or "without an ending"


def _files(directory: Path) -> Iterator[str]:
    """The paths of all files below ``directory`` but those in hidden folders."""
    for folder, below, files in os.walk(directory, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        prefix = Path(folder).relative_to(directory)
        for name in files:
            yield (prefix / name).as_posix()


def _check_test_classes(train: dict[str, str | None], test: dict[str, str | None], directory: Path) -> None:
    unlabelled = [name for name, label in test.items() if label is None]
    if unlabelled:
        raise DataError(
            f"{directory / LABEL_FILE} has no line for {len(unlabelled)} images, the first {unlabelled[0]!r}; test images need "
            f"classes: add them, or move the images to {TRAIN}/"
        )
    unknown = sorted({str(label) for label in test.values()} - set(train.values()))
    if unknown:
        raise DataError(
            f"{directory} has {len(unknown)} classes that no image of {TRAIN}/ has: {', '.join(unknown[:5])}. Both parts need "
            f"the same classes (ImageNet's validation images are downloaded without folders: they have to be sorted into them)"
        )


def _hold_out(classes: dict[str, str | None], fraction: float) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Training and test images of a folder without parts; the choice depends on names alone, not on what else is there."""
    if fraction == 0:
        return classes, {}
    members: dict[str, list[str]] = {}
    for name, label in classes.items():
        if label is not None:
            members.setdefault(label, []).append(name)
    held: set[str] = set()
    for names in members.values():
        names.sort(key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name))
        # A class with one image keeps it.
        held.update(names[: max(int(fraction * len(names)), int(len(names) > 1))])
    if not held:
        raise DataError(
            "no class has two labelled images, so none can be held out to test on; --test-fraction 0 goes without test images; "
            + LAYOUTS
        )
    train = {name: label for name, label in classes.items() if name not in held}
    return train, {name: label for name, label in classes.items() if name in held}


def _class_order(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else -1, name)
