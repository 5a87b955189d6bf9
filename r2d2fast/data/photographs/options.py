"""How photographs become batches."""

from dataclasses import dataclass
from typing import get_args

from r2d2fast.data.photographs.crop import Interpolation
from r2d2fast.image_options import Decoder, OnBadImage

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
        mean, std: of each channel, in units of the full range, with which images are normalised.

    Raises ValueError for a value that is not accepted.
    """

    image_size: int = 224
    resize: int = 256
    workers: int = 0
    on_bad_image: OnBadImage = "error"
    decoder: Decoder = "cpu"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        for name, accepted in (("on_bad_image", OnBadImage), ("decoder", Decoder)):
            if getattr(self, name) not in get_args(accepted):
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(get_args(accepted))}")
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(
                f"image_size is {self.image_size} and resize {self.resize}; accepted: 1 <= image_size <= resize"
            )
        if self.decoder == "dali" and self.interpolation != "bilinear":
            raise ValueError(
                f"decoder is 'dali', which resizes bilinearly, and this network wants {self.interpolation} images"
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; accepted: 0 or more")
