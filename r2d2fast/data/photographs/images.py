"""Photographs of their own sizes, read and decoded while training goes on."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.errors import DataError
from r2d2fast.data.names import Names
from r2d2fast.data.order import Batch, keys_of
from r2d2fast.data.photographs.crop import RANDOM_NUMBERS, Crop, centre_crop, random_crop
from r2d2fast.data.photographs.dali import dali_batches, require_dali
from r2d2fast.data.photographs.decode import BadImageError, decode
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.photographs.workers import load_batches
from r2d2fast.data.preprocessing import Preprocessing
from r2d2fast.data.random_numbers import uniform


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
        """See ``Files.read``. A file that is gone from a folder in which others are is a damaged image, and so is a link to one;
        where the folder is gone, or empty, as that of a file server that is away, reading it is an error."""
        path = f"{self.directory}/{self.names[sample]}"
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            target = os.path.realpath(path)
            try:
                others = os.listdir(os.path.dirname(target))
            except OSError:
                others = []
            # The link itself is one that is there.
            if not set(others) - {os.path.basename(path)}:
                raise
            why = (
                f"a link to {target}, which is not there" if os.path.islink(path) else "the file is not there any more"
            )
            raise BadImageError(self.names[sample], why) from error
        except OSError as error:
            # Where a file is open already, as when its server goes away, the error has no name in it.
            raise OSError(error.errno, error.strerror, path) from error


@dataclass(frozen=True)
class Load:
    """What loader processes do: the images of a batch as bytes."""

    files: Files
    options: PhotographOptions
    augmentation: Augmentation | None
    seed: int

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Exception]]:
        """Images, uint8 ``[B, 3, size, size]``, channels last, and what went wrong; exceptions of a worker lose their form."""
        images = self.empty(len(batch.samples))
        failures: list[Exception] = []
        for place, (sample, numbers) in enumerate(zip(batch.samples.tolist(), self.numbers(batch), strict=True)):
            try:
                self.write_crop(images[place], self.files.read(sample), sample, numbers)
            except (BadImageError, OSError) as error:
                failures.append(error)
        return images, failures

    def empty(self, count: int) -> Tensor:
        """Images of the mean colour: uint8 ``[count, 3, size, size]``, channels last."""
        size = self.options.image_size
        images = torch.empty(count, size, size, 3, dtype=torch.uint8)
        return images.copy_(torch.tensor(self.options.mean).mul(255).round()).permute(0, 3, 1, 2)

    def numbers(self, batch: Batch) -> list[list[float]]:
        """For each image of a batch the random numbers that :meth:`crop` takes; none for evaluation."""
        if self.augmentation is None:
            return [[]] * len(batch.samples)
        return uniform(self.seed, keys_of(batch), RANDOM_NUMBERS).tolist()

    def crop(self, height: int, width: int, numbers: list[float]) -> Crop:
        """The crop of a photograph of a size that training, or evaluation, is to see."""
        options = self.options
        if self.augmentation is None:
            return centre_crop(height, width, options.resize, options.image_size)
        return random_crop(height, width, options.image_size, numbers, self.augmentation.flip)

    def write_crop(self, image: Tensor, data: bytes | memoryview, sample: int, numbers: list[float]) -> None:
        """Write the crop of an encoded photograph into ``image``, uint8 ``[3, size, size]``. Raises BadImageError."""
        pixels = decode(data, self.files.names[sample])
        height, width, _ = pixels.shape
        image.copy_(self.crop(height, width, numbers).of(pixels, self.options.interpolation)[0])


class PhotographImages:
    """One part of a data set of image files (``Images``), in a folder or packed.

    Training sees torchvision's RandomResizedCrop, mirrored with probability ½ if the augmentation says so; evaluation the centre
    after resizing the short side. Loader processes make batches of bytes, ahead; the device turns them into numbers: with
    the mean and standard deviation of the options, ImageNet's by default, whatever the data set is, so that pretrained networks
    fit.

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
        self.preprocessing = Preprocessing(
            "photographs", self.shape, options.mean, options.std, 255.0, options.resize, options.interpolation
        )
        self.bad_images: dict[str, str] = {}
        self._device = device
        self._options = options
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (options.mean, options.std))
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for shifts or a cutout, which photographs do not have; while it goes on
        BadImageError, DataError for a file that cannot be read, LoaderError for a loader process that died."""
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
                if isinstance(failure, OSError):
                    link = (
                        f", a link to {os.path.realpath(failure.filename)}" if os.path.islink(failure.filename) else ""
                    )
                    raise DataError(
                        f"cannot read {failure.filename}{link}: {failure.strerror}. When it can be read again --resume goes on; "
                        "without it, begin in another --run-dir"
                    ) from failure
                if not (self._options.on_bad_image == "skip" and isinstance(failure, BadImageError)):
                    raise failure
                self.bad_images[failure.name] = failure.reason
            images = pixels.to(self._device, non_blocking=True).to(torch.float32)
            yield images.mul_(self._scale).add_(self._shift)
