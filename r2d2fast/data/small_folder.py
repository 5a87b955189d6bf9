"""Folders of small images: decoded once, and kept on the training device as those of CIFAR-10 are."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data.errors import DataError
from r2d2fast.data.photographs.decode import BadImageError, decode, image_header
from r2d2fast.data.photographs.images import Files
from r2d2fast.data.photographs.packed import is_packed, open_packed
from r2d2fast.data.photographs.tree import LAYOUTS, Tree, image_names
from r2d2fast.data.resident import ResidentImages, channel_statistics
from r2d2fast.image_options import OnBadImage

LARGEST_SIDE = 64
"""Pixels. Larger images are photographs, of which training sees random crops."""


def small_image_shape(root: Path) -> tuple[int, int, int] | None:
    """(C, H, W) of the images below ``root``, a folder or packed, if all have one size of at most 64 x 64 pixels; else None.

    Images are grey, C = 1, if all of them are, and RGB, C = 3, otherwise. Only headers are looked at, up to the first image that
    is too large; what has no header that can be read does not count here.
    """
    size: tuple[int, int] | None = None
    all_grey = True
    for data in _encoded_images(root):
        header = image_header(data)
        if header is None:
            continue
        height, width, grey = header
        if max(height, width) > LARGEST_SIDE or size not in (None, (height, width)):
            return None
        size = height, width
        all_grey &= grey
    return None if size is None else (1 if all_grey else 3, *size)


def _encoded_images(root: Path) -> Iterator[bytes | memoryview]:
    if is_packed(root):
        for part in (tree := open_packed(root)).train, tree.test:
            for sample in range(len(part.files)):
                try:
                    yield part.files.read(sample)
                except BadImageError:
                    continue
    else:
        for name in image_names(root):
            try:
                yield (root / name).read_bytes()
            except OSError:
                continue  # told where the image is needed


def load_small_images(
    tree: Tree, shape: tuple[int, int, int], device: torch.device, on_bad_image: OnBadImage
) -> tuple[ResidentImages, ResidentImages]:
    """The training and the test images of ``tree``, of ``shape`` (C, H, W), on ``device``.

    Normalised with mean and standard deviation of each channel over the training images. A damaged image raises BadImageError
    or, with ``on_bad_image`` ``"skip"``, is replaced by one of the mean colour, zeros once normalised, and is listed in
    ``bad_images``.
    """
    (train, train_bad), (test, test_bad) = (
        _decoded(part.files, shape, on_bad_image) for part in (tree.train, tree.test)
    )
    good = torch.tensor([name not in train_bad for name in tree.train.files.names])
    if not good.any():
        raise DataError(f"none of the {len(train)} training images can be decoded; {LAYOUTS}")
    mean, std = channel_statistics(train[good] if train_bad else train)
    parts = []
    for pixels, files, bad in ((train, tree.train.files, train_bad), (test, tree.test.files, test_bad)):
        for number, name in enumerate(files.names) if bad else ():
            if name in bad:
                pixels[number] = mean.round().byte()[:, None, None]
        parts.append(ResidentImages(pixels, mean, std, device, bad))
    return parts[0], parts[1]


def _decoded(files: Files, shape: tuple[int, int, int], on_bad_image: OnBadImage) -> tuple[Tensor, dict[str, str]]:
    """The pixels, uint8 ``[M, C, H, W]``, channels last, and the reason by name of the images that are damaged."""
    channels, height, width = shape
    pixels = torch.zeros(len(files), height, width, channels, dtype=torch.uint8)
    images = pixels.numpy()
    bad: dict[str, str] = {}
    for sample, name in enumerate(files.names):
        try:
            # Of a grey image all channels are equal.
            images[sample] = decode(files.read(sample), name)[:, :, :channels]
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            bad[error.name] = error.reason
        except OSError as error:
            raise DataError(f"cannot read {name}: {error}") from error
    return pixels.permute(0, 3, 1, 2), bad
