"""Batches of photographs, decoded and resized by the CPU."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.order import Batch, keys_of
from r2d2fast.data.photographs.crop import RANDOM_NUMBERS, Crop, Interpolation, centre_crop, random_crop
from r2d2fast.data.photographs.decode import BadImageError, decode
from r2d2fast.data.photographs.tree import Files
from r2d2fast.data.random_numbers import uniform

OnBadImage = Literal["error", "skip"]
Decoder = Literal["cpu", "dali"]
# Of ImageNet's training images, in units of the full range; what networks trained on it expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PhotographOptions:
    """How photographs become batches.

    Attributes:
        image_size: side of the images in a batch, pixels.
        resize: what the short side is resized to before evaluation takes the centre; at least ``image_size``.
        workers: loader processes; 0: images are loaded in this one, when they are asked for.
        on_bad_image: ``"error"``: a damaged image raises BadImageError, which names it. ``"skip"``: in its place comes an image
            of the mean colour, zeros once normalised, which tells the network next to nothing; the sample keeps its number and
            its row in the bank. (Another sample's picture would train this sample's label or pseudo-logits on what it does not
            show. To leave such images out for good, pack the data set with ``--on-bad-image skip``.)
        decoder: ``"cpu"``: the loader processes decode and resize. ``"dali"``: they only read, and NVIDIA DALI decodes and
            resizes on the training device (:mod:`r2d2fast.data.photographs.dali`).
        interpolation: by which filter the CPU resizes.

    Raises ValueError for a value that is not accepted.
    """

    image_size: int = 224
    resize: int = 256
    workers: int = 0
    on_bad_image: OnBadImage = "error"
    decoder: Decoder = "cpu"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name, accepted in (("on_bad_image", OnBadImage), ("decoder", Decoder)):
            if getattr(self, name) not in get_args(accepted):
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(get_args(accepted))}")
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(
                f"image_size is {self.image_size} and resize {self.resize}; accepted: 1 <= image_size <= resize"
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; accepted: 0 or more")


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
        return images.copy_(torch.tensor(MEAN).mul(255).round()).permute(0, 3, 1, 2)

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
