"""Pixels of a photograph as the network's input: RandomResizedCrop and mirroring in training, the centre in evaluation."""

import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, from_numpy

# torchvision's defaults, with which ImageNet figures are made (Szegedy et al., CVPR 2015).
_SCALE = (0.08, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10
RANDOM_NUMBERS = 2 * _TRIES + 3
"""Uniform in [0, 1), that a training view takes."""

# A wider picture is cut to this ratio before it is resized: the centre is all that evaluation sees, and one line of 60 000 pixels
# would become 256 lines of 15 million.
_WIDEST = 16


def random_crop(height: int, width: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
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


def training_view(pixels: np.ndarray, size: int, numbers: Sequence[float], flip: bool) -> Tensor:
    """A random crop of ``pixels`` (uint8 ``[H, W, 3]``), resized; mirrored if ``flip`` and the last of ``numbers`` is below ½.

    Returns:
        uint8 ``[1, 3, size, size]``, channels last.
    """
    top, left, height, width = random_crop(pixels.shape[0], pixels.shape[1], numbers)
    view = resized(pixels[top : top + height, left : left + width], (size, size))
    return view.flip(-1) if flip and numbers[RANDOM_NUMBERS - 1] < 0.5 else view


def evaluation_view(pixels: np.ndarray, short_side: int, size: int) -> Tensor:
    """The centre of ``pixels`` (uint8 ``[H, W, 3]``), its short side resized: torchvision's ``Resize`` and ``CenterCrop``.

    ``short_side`` is at least ``size``.

    Returns:
        uint8 ``[1, 3, size, size]``, channels last.
    """
    height, width = pixels.shape[:2]
    down, across = (max(0, (one - _WIDEST * other) // 2) for one, other in ((height, width), (width, height)))
    view = with_short_side(pixels[down : height - down, across : width - across], short_side)
    top, left = (round((side - size) / 2) for side in view.shape[2:])
    return view[:, :, top : top + size, left : left + size]


def with_short_side(pixels: np.ndarray, short_side: int) -> Tensor:
    """``pixels`` (uint8 ``[H, W, 3]``) by torchvision's ``Resize(short_side)``: uint8 ``[1, 3, h, w]``, channels last."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    return resized(pixels, (int(short_side * height / shorter), int(short_side * width / shorter)))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """``pixels`` (uint8 ``[H, W, 3]``), by the antialiased bilinear filter: uint8 ``[1, 3, *size]``, channels last."""
    # The first axis comes before the others are permuted: only so does PyTorch see channels last, and skip the planar layout.
    image = from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return image if image.shape[2:] == size else F.interpolate(image, size, mode="bilinear", antialias=True)
