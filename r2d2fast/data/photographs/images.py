"""Photographs of their own sizes, decoded while training goes on."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.order import Batch
from r2d2fast.data.photographs.dali import dali_batches, require_dali
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.load import MEAN, STD, Load, PhotographOptions
from r2d2fast.data.photographs.tree import Files
from r2d2fast.data.photographs.workers import load_batches
from r2d2fast.data.preprocessing import Preprocessing


class PhotographImages:
    """One part of a data set of image files (``Images``), in a folder or packed.

    Training sees torchvision's RandomResizedCrop, mirrored with probability ½ if the augmentation says so; evaluation the centre
    after resizing the short side. Loader processes make batches of bytes, ahead; the device turns them into numbers: with
    ImageNet's mean and standard deviation, whatever the data set is, so that pretrained networks fit.

    Args:
        files: the encoded images.
        device: where batches are wanted.
        options: how they are made.

    Attributes:
        shape: (3, image_size, image_size).
        bad_images: reason by name, of the damaged images met and skipped so far.

    Raises DataError if the options ask for a decoder that is not installed.
    """

    def __init__(self, files: Files, device: torch.device, options: PhotographOptions) -> None:
        if options.decoder == "dali":
            require_dali()
        self.files = files
        self.shape = (3, options.image_size, options.image_size)
        self.preprocessing = Preprocessing("photographs", self.shape, MEAN, STD, 255.0, options.resize)
        self.bad_images: dict[str, str] = {}
        self._device = device
        self._options = options
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for shifts or a cutout, which photographs do not have; while it goes on
        BadImageError, OSError for a file that cannot be read, LoaderError for a loader process that died."""
        if augmentation is not None and (augmentation.translate or augmentation.cutout):
            raise ValueError(
                f"translate is {augmentation.translate} and cutout {augmentation.cutout}; accepted for photographs: 0, they are "
                "cropped at random"
            )
        return self._batches(self.loading(augmentation, seed), order)

    def loading(self, augmentation: Augmentation | None, seed: int) -> Load:
        """What loader processes call for each batch, where the CPU decodes."""
        return Load(self.files, self._options, augmentation, seed)

    def _batches(self, load: Load, order: Sequence[Batch]) -> Iterator[Tensor]:
        if self._options.decoder == "dali":
            loaded = dali_batches(load, order, self._device)
        else:
            loaded = load_batches(load, order, self._options.workers, pin=self._device.type == "cuda")
        for pixels, failures in loaded:
            for failure in failures:
                if not (self._options.on_bad_image == "skip" and isinstance(failure, BadImageError)):
                    raise failure
                self.bad_images[failure.name] = failure.reason
            images = pixels.to(self._device, non_blocking=True).to(torch.float32)
            yield images.mul_(self._scale).add_(self._shift)
