"""A folder of photographs of ImageNet's sizes, cut out of the two that scikit-learn ships."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIZES = ((500, 375),) * 5 + ((375, 500),) * 2 + ((500, 333),) * 2 + ((333, 500),)
"""Width and height. ImageNet's are mostly these; its mean is 400 x 350 or, larger ones as they are, 469 x 387."""
QUALITY = 98
"""0.60 bytes a pixel here. ImageNet's have 0.63: ILSVRC2012_img_train.tar has 147.9 GB for 1 281 167 images of, on average, that
size."""


def write_photographs(
    root: Path, train: int, val: int, sizes: Sequence[tuple[int, int]] = SIZES, quality: int = QUALITY
) -> None:
    """Write ``root``/train and ``root``/val, two class folders each, a photograph a class, with so many JPEG files in all.

    Each file is a piece of the photograph, pixel for pixel; upright ones are turned by 90°, since the photographs are 640 x 427.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = random.Random(0)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            name, photograph = ("china", "flower")[number % 2], photographs[number % 2]
            width, height = sizes[number // 2 % len(sizes)]
            if height > width:
                photograph = photograph.transpose(Image.Transpose.ROTATE_90)
            left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
            path = root / part / name / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph.crop((left, top, left + width, top + height)).save(path, quality=quality)
