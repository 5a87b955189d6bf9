"""Data sets as tensors: normalised images in memory, true labels, a fixed test split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

DIGITS_TEST_IMAGES = 360


@dataclass(frozen=True)
class ImageDataset:
    """Training and test images of one data set.

    Attributes:
        train_images: float32 ``[M, C, H, W]``, normalised with the mean and standard deviation of all training images.
        train_labels: int64 ``[M]``, the true class of every training image; of those that a split leaves unlabelled, to
            measure pseudo-label error only.
        test_images: float32 ``[T, C, H, W]``, normalised with the same mean and standard deviation.
        test_labels: int64 ``[T]``.
        num_classes: N.
        background: the normalised value of an empty pixel, what a translation fills in.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    background: float

    def to(self, device: torch.device) -> "ImageDataset":
        """The same data on ``device``."""
        return ImageDataset(
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.num_classes,
            self.background,
        )


def load_dataset(name: str) -> ImageDataset:
    """The data set ``name``, on the CPU. Raises ValueError for a name that is not in :data:`DATASETS`."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; accepted: {', '.join(DATASETS)}")
    return DATASETS[name]()


def _digits() -> ImageDataset:
    """scikit-learn's 1797 handwritten digits, 8×8: 1437 to train on; 360, stratified, always the same, to test on."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    classes = torch.tensor(labels, dtype=torch.int64)
    # A constant random_state, not the run's seed: errors of all seeds and splits are over the same test images.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=0
    )
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return ImageDataset(
        images[train], classes[train], images[test], classes[test], num_classes=10, background=float(-mean / std)
    )


DATASETS: dict[str, Callable[[], ImageDataset]] = {"digits": _digits}
