"""Small data sets in the true formats of the large ones, which nobody may pass on."""

import gzip
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST


def images(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar10(root: Path, patch: pytest.MonkeyPatch, per_file: int = 20) -> None:
    """Five pickled training batches, a test batch and the names, as in cifar-10-python.tar.gz."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for seed, (file, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        batch = {
            "batch_label": f"batch {seed}",
            "labels": [(number * 3 + seed) % 10 for number in range(per_file)],
            "data": images(per_file, (3072,), seed),
            "filenames": [f"{number}.png" for number in range(per_file)],
        }
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"num_cases_per_batch": per_file, "label_names": names, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    _accept_cifar(CIFAR10, folder, patch)


def cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    """One pickle of training images, one of test images, one of names, as in cifar-100-python.tar.gz."""
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    for seed, (file, count) in enumerate((("train", 200), ("test", 100))):
        part = {
            "fine_labels": [(number * 7 + seed) % 100 for number in range(count)],
            "coarse_labels": [0] * count,
            "data": images(count, (3072,), seed),
        }
        (folder / file).write_bytes(pickle.dumps(part, protocol=2))
    meta = {"fine_label_names": [f"name{number}" for number in range(100)], "coarse_label_names": ["all"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    _accept_cifar(CIFAR100, folder, patch)


def _accept_cifar(kind: type[CIFAR10], folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kind, "train_list", [[file, md5(folder / file)] for file, _ in kind.train_list])
    patch.setattr(kind, "test_list", [[file, md5(folder / file)] for file, _ in kind.test_list])
    patch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / kind.meta["filename"])})


def archive(folder: Path, target: Path) -> None:
    """``folder`` as the tar.gz that its data set's page offers."""
    with tarfile.open(target, "w:gz") as file:
        file.add(folder, arcname=folder.name)


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    """MATLAB files: X, 32 x 32 x 3 x M, and y, M x 1, where the digit 0 is class 10."""
    root.mkdir(parents=True, exist_ok=True)
    accepted = dict(SVHN.split_list)
    for seed, (split, count) in enumerate((("train", 60), ("test", 30))):
        url, file, _ = accepted[split]
        pixels = images(count, (3, 32, 32), seed)
        labels = np.array([(number + seed) % 10 or 10 for number in range(count)], dtype=np.uint8)
        savemat(root / file, {"X": pixels.transpose(2, 3, 1, 0), "y": labels[:, None]}, do_compression=True)
        accepted[split] = [url, file, md5(root / file)]
    patch.setattr(SVHN, "split_list", accepted)


def mnist(folder: Path, *, packed: bool, train: int = 50, test: int = 20) -> None:
    """Four idx files of 28 x 28 images and their classes, plain or packed by gzip."""
    folder.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        pixels, labels = images(count, (28, 28), seed), np.array([(number + seed) % 10 for number in range(count)])
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8), packed)


def write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + values.tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def accept_mnist(kind: type[MNIST] | type[FashionMNIST], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let torchvision take the packed files in ``folder`` for the originals when it downloads them."""
    patch.setattr(kind, "resources", [(file, md5(folder / file)) for file, _ in kind.resources])
