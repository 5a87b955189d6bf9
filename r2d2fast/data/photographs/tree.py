"""Folders of image files: which images there are, and their classes."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from r2d2fast.command import as_called
from r2d2fast.data.errors import DataError
from r2d2fast.data.names import Names
from r2d2fast.image_options import TEST_FRACTION

LABEL_FILE = "labels.txt"
TRAIN = "train"
# The first that is there: ImageNet's own test/ has no labels.
TESTS = ("val", "test")
LAYOUTS = f"""accepted:
  DIR/{TRAIN}/CLASS/*.jpg and DIR/{TESTS[0]}/CLASS/*.jpg (or {TESTS[1]}), a folder for each class;
  DIR/CLASS/*.jpg: of the labelled images, --test-fraction are held out to test on;
  DIR/*.jpg with DIR/{LABEL_FILE}, lines 'FILENAME CLASS'; images without a line are unlabelled. {TRAIN}/ and {TESTS[0]}/ can have
    the same form;
  what {as_called("pack")} has written.
Endings: {" ".join(IMG_EXTENSIONS)}"""


class Files(Protocol):
    """The encoded images of one part of a data set, wherever they are. Goes to loader processes, so it can be pickled."""

    names: Names

    def __len__(self) -> int: ...

    def read(self, sample: int) -> bytes | memoryview:
        """The bytes of one image file. Raises OSError if they cannot be read, BadImageError if they are known to be damaged."""
        ...


class FolderFiles:
    """Image files in a folder (``Files``).

    Args:
        directory: of the files.
        names: their paths in it, with forward slashes.
    """

    def __init__(self, directory: Path, names: Names) -> None:
        self.directory = directory
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> bytes:
        with open(f"{self.directory}/{self.names[sample]}", "rb") as file:
            return file.read()


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
    """

    class_names: Sequence[str]
    train: Part
    test: Part
    held_out: int = 0


def read_tree(root: Path, test_fraction: float = TEST_FRACTION) -> Tree:
    """The images below ``root`` in one of the layouts of :data:`LAYOUTS`, in the order of their names.

    Classes are numbered in the order of their names, by value if they are whole numbers. Files and folders whose names begin with
    a dot are left out. Raises DataError if there is no such layout, naming what is wrong.

    Args:
        root: the folder.
        test_fraction: of the labelled images of each class, the share that is kept for tests where there is no part for them,
            at least one of a class of two or more; 0 for none.
    """
    if not 0 <= test_fraction < 1:
        raise DataError(f"--test-fraction is {test_fraction}; accepted: at least 0, for no test images, and below 1")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUTS}")
    test_directory = next((root / name for name in TESTS if (root / name).is_dir()), None)
    if (root / TRAIN).is_dir():
        train = _classes_by_name(root / TRAIN)
        if test_directory is not None:
            test = _classes_by_name(test_directory)
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
        train, test = _hold_out(_classes_by_name(root), test_fraction)
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
    return Tree(class_names, train_part, test_part, held_out)


def _int64(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _classes_by_name(directory: Path) -> dict[str, str | None]:
    """The class of each image below ``directory``, None if it has none; sorted by name."""
    names = sorted(image_names(directory))
    if not names:
        raise DataError(f"{directory} has no images; {LAYOUTS}")
    if (directory / LABEL_FILE).is_file():
        labelled = read_labels(directory / LABEL_FILE)
        missing = sorted(labelled.keys() - set(names))
        if missing:
            raise DataError(
                f"{directory / LABEL_FILE} names {len(missing)} images that are not there, the first {missing[0]!r}: "
                f"remove their lines, or add the files below {directory}"
            )
        return {name: labelled.get(name) for name in names}
    beside = [name for name in names if "/" not in name]
    if beside:
        raise DataError(
            f"{directory} has images outside class folders, the first {beside[0]!r}, and no {LABEL_FILE} that gives their "
            f"classes; {LAYOUTS}"
        )
    return {name: name.partition("/")[0] for name in names}


def image_names(directory: Path) -> Iterator[str]:
    """The paths of all image files below ``directory``, in it, with forward slashes."""
    for folder, below, files in os.walk(directory, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        prefix = Path(folder).relative_to(directory)
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield (prefix / name).as_posix()


def read_labels(path: Path) -> dict[str, str]:
    """The class of each image that a file of labels names. Raises DataError for a line that is none."""
    classes: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); accepted: lines 'FILENAME CLASS'") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # A file name may have spaces in it, a class none.
        name, _, label = line.strip().rpartition(" ") if " " in line.strip() else line.strip().rpartition("\t")
        name = name.strip()
        if not name:
            raise DataError(f"{path}, line {number}: {line!r} is not 'FILENAME CLASS'")
        if classes.setdefault(name, label) != label:
            raise DataError(
                f"{path}, line {number}: {name!r} has class {label!r}, but {classes[name]!r} before; keep one"
            )
    return classes


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
