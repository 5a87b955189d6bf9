"""Small photographs, cut out of the two that scikit-learn ships, and folders of them."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def piece(number: int, width: int = 96, height: int = 72) -> Image.Image:
    """A piece of a photograph, another one for each number, of either of them in turn."""
    photograph = _photographs()[number % 2]
    left, top = number * 37 % (photograph.width - width), number * 53 % (photograph.height - height)
    return photograph.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """As Pillow decodes them, RGB."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def write_class_folders(part: Path, images: int, width: int = 96, height: int = 72) -> None:
    """``images`` JPEG files in ``part``/china and ``part``/flower, in turn."""
    for number in range(images):
        path = part / ("china", "flower")[number % 2] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each fourth one upright.
        size = (height, width) if number % 4 == 3 else (width, height)
        path.write_bytes(encoded(piece(number, *size), quality=95))


def write_tree(root: Path, train: int = 12, val: int = 6, width: int = 96, height: int = 72) -> Path:
    write_class_folders(root / "train", train, width, height)
    write_class_folders(root / "val", val, width, height)
    return root
