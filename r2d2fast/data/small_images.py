"""The data sets of small images, by name, from files that are where torchvision has them."""

import gzip
import http.client
import math
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import check_integrity

from r2d2fast.data.dataset import Dataset
from r2d2fast.data.errors import DataError
from r2d2fast.data.resident import ResidentImages, channel_statistics

DIGITS_TEST_IMAGES = 360
FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has the files."""

_DIGIT_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class _Part:
    """Images, uint8 ``[M, C, H, W]``, and their classes, int64 ``[M]``."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Files:
    train: _Part
    test: _Part
    class_names: Sequence[str]


def load_dataset(name: str, root: Path, device: torch.device, download: bool) -> Dataset:
    """The data set ``name``, its images held on ``device``.

    Images are normalised with mean and standard deviation of each channel over the training images. Training samples are named
    by their numbers, from 0.

    Args:
        name: one of :data:`SMALL_DATASETS`.
        root: directory with the data set's files, named as torchvision names them; ``digits`` needs none.
        device: where the images are kept and their batches made.
        download: let torchvision get files that are missing, into ``root``.

    Raises:
        DataError: an unknown name, missing or damaged files, a download that failed.
    """
    if name not in _READERS:
        raise DataError(f"unknown data set {name!r}; accepted: {', '.join(SMALL_DATASETS)}")
    files = _READERS[name](root, download)
    mean, std = channel_statistics(files.train.pixels)
    return Dataset(
        train=ResidentImages(files.train.pixels, mean, std, device),
        test=ResidentImages(files.test.pixels, mean, std, device),
        train_labels=files.train.labels,
        test_labels=files.test.labels,
        class_names=files.class_names,
        train_names=[str(number) for number in range(len(files.train.labels))],
    )


def _digits(root: Path, download: bool) -> _Files:
    """scikit-learn's 1797 handwritten digits, 8×8: 1437 to train on; 360, stratified, always the same, to test on."""
    # Here, because it takes a second or two, and no other data set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, classes = load_digits(return_X_y=True)
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 8, 8)
    labels = torch.tensor(classes, dtype=torch.int64)
    # A constant random_state, not the run's seed: errors of all seeds and splits are over the same test images.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=classes, random_state=0
    )
    return _Files(_Part(pixels[train], labels[train]), _Part(pixels[test], labels[test]), _DIGIT_NAMES)


# --- CIFAR and SVHN: torchvision has an MD5 of every file ----------------------------------------------------------


def _cifar(kind: type[CIFAR10], root: Path, download: bool) -> _Files:
    meta = (kind.meta["filename"], kind.meta["md5"])
    files = [(f"{kind.base_folder}/{file}", md5) for file, md5 in [*kind.train_list, *kind.test_list, meta]]
    remedy = f"unpack {kind.url} in {root}"
    if download:
        _download(lambda: kind(root, download=True), root, remedy)
    _check_originals(files, root, remedy)

    def part(read: CIFAR10) -> _Part:
        return _Part(torch.from_numpy(read.data).permute(0, 3, 1, 2), torch.tensor(read.targets))

    train = kind(root, train=True)
    return _Files(part(train), part(kind(root, train=False)), train.classes)


def _svhn(root: Path, download: bool) -> _Files:
    urls, files, md5s = zip(*(SVHN.split_list[split] for split in ("train", "test")), strict=True)
    remedy = f"put {' and '.join(urls)} into {root}"
    if download:
        for split in ("train", "test"):
            _download(partial(SVHN, root, split, download=True), root, remedy)
    _check_originals(list(zip(files, md5s, strict=True)), root, remedy)

    def part(split: str) -> _Part:
        read = SVHN(root, split)
        return _Part(torch.from_numpy(np.ascontiguousarray(read.data)), torch.from_numpy(read.labels))

    return _Files(part("train"), part("test"), _DIGIT_NAMES)


def _download(get: Callable[[], object], root: Path, remedy: str) -> None:
    try:
        get()
    # No network, a full disk, an archive cut off.
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        # torchvision's reasons can be several lines.
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"the download into {root} failed: {reason}. Try again, or {remedy}") from error


def _check_originals(files: Sequence[tuple[str, str]], root: Path, remedy: str) -> None:
    _check_present([file for file, _ in files if not (root / file).is_file()], root, remedy)
    for file, md5 in files:
        try:
            original = check_integrity(root / file, md5)
        except OSError as error:
            raise DataError(f"cannot read {root / file}: {error.strerror}") from error
        if not original:
            raise DataError(
                f"{root / file} is damaged: its MD5 is not the original's, {md5}. Remove it and {remedy}, or let "
                "--download do so"
            )


def _check_present(missing: Sequence[str], folder: Path, remedy: str) -> None:
    if missing:
        raise DataError(f"missing in {folder}: {', '.join(missing)}; {remedy}, or let --download do so")


# --- MNIST and Fashion-MNIST: idx files, plain or packed by gzip ---------------------------------------------------


def _mnist(root: Path, download: bool) -> _Files:
    return _idx_files(MNIST, root / "MNIST" / "raw", root if download else None, "", _DIGIT_NAMES)


def _fashion_mnist(root: Path, download: bool) -> _Files:
    folder = root / "FashionMNIST" / "raw"
    package = FASHION_MNIST_PACKAGE
    if _missing(FashionMNIST, folder) and not _missing(FashionMNIST, package):
        folder = package
    hint = f", or install Debian's package dataset-fashion-mnist, which has them in {package}"
    return _idx_files(FashionMNIST, folder, root if download else None, hint, FashionMNIST.classes)


def _idx_files(
    kind: type[MNIST], folder: Path, download_root: Path | None, hint: str, class_names: Sequence[str]
) -> _Files:
    remedy = f"put the four files of {kind.mirrors[0]}, packed (.gz) or unpacked, into {folder}{hint}"
    if download_root is not None and _missing(kind, folder):
        _download(lambda: kind(download_root, download=True), download_root, remedy)
    _check_present(_missing(kind, folder), folder, remedy)

    def part(images_file: str, labels_file: str) -> _Part:
        pixels, labels = _idx(folder / images_file, 3, remedy), _idx(folder / labels_file, 1, remedy)
        if len(pixels) != len(labels) or not len(labels) or int(labels.max()) >= len(class_names):
            raise DataError(
                f"{folder / labels_file} has {len(labels)} classes, the largest {max(labels.tolist(), default=None)}, "
                f"for {len(pixels)} images of {len(class_names)} classes in {images_file}. Remove both and {remedy}"
            )
        return _Part(pixels[:, None], labels.long())

    train_images, train_labels, test_images, test_labels = _names(kind)
    return _Files(part(train_images, train_labels), part(test_images, test_labels), class_names)


def _names(kind: type[MNIST]) -> list[str]:
    return [file.removesuffix(".gz") for file, _ in kind.resources]


def _missing(kind: type[MNIST], folder: Path) -> list[str]:
    return [name for name in _names(kind) if not (folder / name).is_file() and not (folder / f"{name}.gz").is_file()]


def _idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """The array of bytes in the idx file ``path``, or in ``path``.gz, which torchvision does not read: two bytes 0, the type (8),
    the number of dimensions, each of them as a big-endian uint32, the values."""
    path = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. Remove it and {remedy}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start].ljust(4 * dimensions, b"\0"), dtype=">u4").astype(int).tolist()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} is damaged: {len(content)} bytes that begin with {content[:4].hex(' ')} are no idx file of "
            f"{dimensions} dimension{'s' * (dimensions > 1)}, whole. Remove it and {remedy}"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


_READERS: dict[str, Callable[[Path, bool], _Files]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "svhn": _svhn,
    "cifar10": lambda root, download: _cifar(CIFAR10, root, download),
    "cifar100": lambda root, download: _cifar(CIFAR100, root, download),
}
SMALL_DATASETS = tuple(_READERS)
"""Data sets of images small enough to be held on the training device."""
