"""Image files, embeddings, arrays and tensors, as the images or embeddings that a network was evaluated with."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from r2d2fast.data import (
    Augmentation,
    Batch,
    Embeddings,
    Images,
    PhotographImages,
    PhotographOptions,
    Preprocessing,
    ResidentImages,
    consecutive_batches,
)
from r2d2fast.data.embeddings import read_embedding_file
from r2d2fast.data.in_memory import as_image_file
from r2d2fast.data.names import Names, Numbers
from r2d2fast.data.photographs.decode import BadImageError, decode
from r2d2fast.data.photographs.images import Files
from r2d2fast.data.photographs.tree import image_names
from r2d2fast.image_options import OnBadImage

Inputs = str | Path | Sequence[str | Path] | np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]
ACCEPTED = (
    "accepted: the path of an image file or of a folder of them; uint8 arrays [B, H, W] or [B, H, W, C]; uint8 tensors "
    "[B, C, H, W]; a sequence of paths, of arrays [H, W] or [H, W, C], or of tensors [C, H, W], of any sizes; C is 1 or 3"
)


class ImageFiles:
    """Image files (``Files``) by their paths; a file that cannot be read is a bad image."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = Names.of(paths)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> bytes:
        name = self.names[sample]
        try:
            with open(name, "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImageError(name, error.strerror or str(error)) from error


class ArrayFiles:
    """Pixels, uint8 ``[H, W, 1 or 3]`` each, as image files (``Files``): PPM and PGM, which are decoded to the same bytes."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.names = Names.of(map(str, range(len(arrays))))

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, sample: int) -> bytes:
        return as_image_file(self.arrays[sample])


def files_of(inputs: Inputs) -> Files:
    """The image files that ``inputs`` are, or stand for. Raises ValueError or TypeError for what is not accepted."""
    if isinstance(inputs, str | Path):
        return ImageFiles([os.fspath(inputs)] if not os.path.isdir(inputs) else paths_in(Path(inputs)))
    if isinstance(inputs, np.ndarray):
        if inputs.ndim not in (3, 4):
            raise ValueError(f"the array is {inputs.dtype} {list(inputs.shape)}; {ACCEPTED}")
        return ArrayFiles([_checked(image) for image in inputs])
    if isinstance(inputs, Tensor):
        if inputs.ndim != 4:
            raise ValueError(f"the tensor is {inputs.dtype} {list(inputs.shape)}; {ACCEPTED}")
        return ArrayFiles([_checked(_as_array(image)) for image in inputs])
    several: list[Any] = list(inputs)
    if all(isinstance(one, str | Path) for one in several):
        return ImageFiles([os.fspath(path) for path in several])
    if all(isinstance(one, np.ndarray) for one in several):
        return ArrayFiles([_checked(image) for image in several])
    if all(isinstance(one, Tensor) and one.ndim == 3 for one in several):
        return ArrayFiles([_checked(_as_array(image)) for image in several])
    raise TypeError(f"a sequence of {', '.join(sorted({type(one).__name__ for one in several}))}; {ACCEPTED}")


def paths_in(folder: Path) -> list[str]:
    """The paths of all image files below ``folder``, sorted; a folder whose name begins with a dot is left out."""
    return [os.path.join(folder, name) for name in sorted(image_names(folder))]


def _as_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def _checked(image: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, C]``, C 1 or 3."""
    pixels = image[:, :, None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"an image is {image.dtype} {list(image.shape)}; {ACCEPTED}; pixels as files have them, 0 to 255"
        )
    return pixels


def open_inputs(
    preprocessing: Preprocessing, inputs: Inputs, device: torch.device, on_bad_image: OnBadImage, workers: int
) -> tuple[Images, Sequence[str]]:
    """``inputs`` as the network expects them, and their names: paths, or numbers from 0.

    Raises ValueError or TypeError for inputs that are not accepted.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image is {on_bad_image!r}; accepted: {', '.join(get_args(OnBadImage))}")
    if preprocessing.kind == "embeddings":
        return _open_embeddings(preprocessing, inputs, device)
    files = files_of(inputs)
    if preprocessing.kind == "small images":
        return SmallImages(preprocessing, files, device, on_bad_image), files.names
    _, size, _ = preprocessing.shape
    options = PhotographOptions(
        size,
        preprocessing.resize,
        workers,
        on_bad_image,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return PhotographImages(files, device, options), files.names


def _open_embeddings(
    preprocessing: Preprocessing, inputs: Inputs, device: torch.device
) -> tuple[Images, Sequence[str]]:
    (features,) = preprocessing.shape
    names: Sequence[str]
    if isinstance(inputs, str | Path):
        file = read_embedding_file(Path(inputs))
        rows: np.ndarray | Tensor = file.rows
        name, names = str(inputs), file.names
    elif isinstance(inputs, np.ndarray | Tensor):
        rows, name, names = inputs, "X", Numbers(len(inputs))
    else:
        raise TypeError(
            f"got {type(inputs).__name__}; this network takes embeddings: an array or a tensor [B, {features}], or the path of "
            "a .npy or .safetensors file"
        )
    embeddings = Embeddings(rows, device, name)
    if embeddings.shape != (features,):
        raise ValueError(
            f"the rows of {name} have {embeddings.shape[0]} numbers, and this network takes {features}; make them with the "
            "network that made those of the run"
        )
    return embeddings, names


class SmallImages:
    """Image files of one size, decoded a batch at a time (``Images``); without augmentation, as evaluation sees them.

    Args:
        preprocessing: how.
        files: the images.
        device: where batches are wanted.
        on_bad_image: ``"error"``: one that is damaged, or of another size than the network takes, or coloured where it takes grey
            ones, raises BadImageError. ``"skip"``: it is replaced by zeros and listed in ``bad_images``.
    """

    def __init__(
        self, preprocessing: Preprocessing, files: Files, device: torch.device, on_bad_image: OnBadImage
    ) -> None:
        self.preprocessing = preprocessing
        channels, height, width = preprocessing.shape
        self.shape = (channels, height, width)
        self.bad_images: dict[str, str] = {}
        self._files = files
        self._device = device
        self._on_bad_image = on_bad_image
        self._mean, self._std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``."""
        for batch in order:
            pixels = torch.stack([self._pixels(sample) for sample in batch.samples.tolist()])
            resident = ResidentImages(pixels, self._mean, self._std, self._device)
            yield from resident.batches(consecutive_batches(torch.arange(len(pixels)), len(pixels)), augmentation, seed)

    def _pixels(self, sample: int) -> Tensor:
        try:
            return self._decoded(sample)
        except BadImageError as error:
            if self._on_bad_image == "error":
                raise
            self.bad_images[error.name] = error.reason
            return torch.zeros(self.shape, dtype=torch.uint8)

    def _decoded(self, sample: int) -> Tensor:
        name = self._files.names[sample]
        pixels = decode(self._files.read(sample), name)
        channels, height, width = self.shape
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
            raise BadImageError(name, f"{found}, and this network has learned from images of {width} x {height} only")
        if channels == 1 and (pixels != pixels[:, :, :1]).any():
            raise BadImageError(name, "coloured, and this network has learned from grey images only")
        return torch.from_numpy(pixels[:, :, :channels]).permute(2, 0, 1)
