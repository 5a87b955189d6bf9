"""Pixels of a photograph as the network's input: RandomResizedCrop and mirroring in training, the centre in evaluation."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor, from_numpy

Interpolation = Literal["bilinear", "bicubic"]
# torchvision's defaults, with which ImageNet figures are made (Szegedy et al., CVPR 2015).
_SCALE = (0.08, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10
RANDOM_NUMBERS = 2 * _TRIES + 3
"""Uniform in [0, 1), that a random crop takes."""

# A wider picture is cut to this ratio before it is resized: the centre is all that evaluation sees, and one line of 60 000 pixels
# would become 256 lines of 15 million.
_WIDEST = 16


def random_rectangle(height: int, width: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of torchvision's ``RandomResizedCrop``, with the first 22 of ``numbers`` for its randomness.

    Up to ten pairs of an area, uniform in 8 % … 100 % of the image's, and a ratio of width to height, log-uniform in 3/4 … 4/3,
    are tried; the first that fits is put at a uniform place. If none does: the largest centred crop with a ratio in that range.
    """
    for attempt in range(_TRIES):
        area = height * width * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * numbers[2 * attempt])
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * numbers[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            down, across = numbers[2 * _TRIES : 2 * _TRIES + 2]
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    h = min(height, round(width / (3 / 4)))
    w = min(width, round(height * (4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


class Crop(NamedTuple):
    """What the network sees of a photograph, in the order in which it is made. All numbers are pixels.

    Attributes:
        top, left, height, width: what is cut from the photograph,
        rows, columns: resized to this, by an antialiased filter;
        down, across: where in that the crop begins,
        size: its side;
        mirrored: left to right, at last.
    """

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int
    down: int
    across: int
    size: int
    mirrored: bool

    def of(self, pixels: np.ndarray, interpolation: Interpolation = "bilinear") -> Tensor:
        """The crop of ``pixels`` (uint8 ``[H, W, 3]``): uint8 ``[1, 3, size, size]``, channels last."""
        part = pixels[self.top : self.top + self.height, self.left : self.left + self.width]
        image = resized(part, (self.rows, self.columns), interpolation)
        crop = image[:, :, self.down : self.down + self.size, self.across : self.across + self.size]
        return crop.flip(-1) if self.mirrored else crop


def random_crop(height: int, width: int, size: int, numbers: Sequence[float], flip: bool) -> Crop:
    """For training: a random crop of a photograph, resized; mirrored if ``flip`` and the last of ``numbers`` is below ½."""
    return Crop(
        *random_rectangle(height, width, numbers), size, size, 0, 0, size, flip and numbers[RANDOM_NUMBERS - 1] < 0.5
    )


def centre_crop(height: int, width: int, short_side: int, size: int) -> Crop:
    """For evaluation: the centre of a photograph, its short side resized: torchvision's ``Resize`` and ``CenterCrop``.

    ``short_side`` is at least ``size``.
    """
    top, left = (max(0, (one - _WIDEST * other) // 2) for one, other in ((height, width), (width, height)))
    height, width = height - 2 * top, width - 2 * left
    rows, columns = resized_shape(height, width, short_side)
    down, across = (round((side - size) / 2) for side in (rows, columns))
    return Crop(top, left, height, width, rows, columns, down, across, size, False)


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The height and width that torchvision's ``Resize(short_side)`` makes of others."""
    shorter = min(height, width)
    return int(short_side * height / shorter), int(short_side * width / shorter)


def resized(pixels: np.ndarray, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Tensor:
    """``pixels`` (uint8 ``[H, W, 3]``), by an antialiased filter: uint8 ``[1, 3, *size]``, channels last."""
    # The first axis comes before the others are permuted: only so does PyTorch see channels last, and skip the planar layout.
    image = from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return image if image.shape[2:] == size else F.interpolate(image, size, mode=interpolation, antialias=True)
