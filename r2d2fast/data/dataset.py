"""What the trainer asks of a data set, wherever its images, or embeddings, are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from r2d2fast.data.order import Batch
from r2d2fast.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the images of a batch; each has its own.

    Attributes:
        translate: largest shift in pixels, down and right, uniform over whole numbers.
        border: what a shift brings in: the image mirrored at its border pixel, or the data set's background.
        flip: mirror left to right with probability ½.
        cutout: side of the square that is set to 0 after normalisation; its centre is uniform over the pixels, and it is clipped
            at the border. 0 for none.
        randaugment: two random operations of torchvision's RandAugment, after shift and mirror. Of images in memory only.
    Photographs of their own sizes (``PhotographImages``) take RandomResizedCrop instead of shifts, and ``flip``.
    """

    translate: int = 0
    border: str = "background"
    flip: bool = False
    cutout: int = 0
    randaugment: bool = False


class Images(Protocol):
    """The images, or embeddings, of one part, training or test, of a data set."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of them in a batch: (C, H, W) of images, (D,) of embeddings."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How batches are made for evaluation."""
        ...

    @property
    def bad_images(self) -> Mapping[str, str]:
        """Why, by name, of the images that could not be decoded, met and replaced so far."""
        ...

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """The images of each batch of ``order``: float32 ``[B, C, H, W]``, normalised, channels last, on the device that the
        images were made for; without an augmentation as evaluation sees them. With one, batches need ``keys``. Reads ahead where
        the images have to be loaded. Of embeddings float32 ``[B, D]``, not normalised: that is the network's own part."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Training and test images, or embeddings, of one data set.

    Attributes:
        train, test: the images. Of the latter there may be none; then nobody knows a test error.
        train_labels: int64 ``[M]``, on the CPU: the true class of every training image; of those that a split leaves unlabelled,
            to measure pseudo-label error only; −1 where nobody knows it.
        test_labels: int64 ``[T]``, on the CPU.
        class_names: N names.
        train_names: M names, as split files have them: a path within the data set, or the sample's number.
        held_out: how many labelled samples were taken from the training part to test on, as there is no other test part.
        ignored: how many files of a folder were left out, by what they are; None where the data set is no folder.
        warnings: sentences on what may be a mistake in it.
    """

    train: Images
    test: Images
    train_labels: Tensor
    test_labels: Tensor
    class_names: Sequence[str]
    train_names: Sequence[str]
    held_out: int = 0
    ignored: Mapping[str, int] | None = None
    warnings: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        """N."""
        return len(self.class_names)
