"""Writing a packed copy of an image folder, which loads more than twice as fast."""

import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from rich.progress import track

from r2d2fast.data.errors import DataError
from r2d2fast.data.names import Names
from r2d2fast.data.order import Batch, consecutive_batches
from r2d2fast.data.partial_folder import partial_folder, writing
from r2d2fast.data.photographs.crop import resized, resized_shape
from r2d2fast.data.photographs.decode import BadImageError, decode, is_jpeg
from r2d2fast.data.photographs.images import Files
from r2d2fast.data.photographs.packed import FORMAT, HEADER, PARTS, VERSION, is_packed
from r2d2fast.data.photographs.tree import LAYOUTS, Part, read_tree
from r2d2fast.data.photographs.workers import load_batches
from r2d2fast.files import replace_file
from r2d2fast.image_options import TEST_FRACTION, OnBadImage

SHORT_SIDE = 256
QUALITY = 90
_AT_ONCE = 32
# The bytes of an image, or what is wrong with it.
_Packed = bytes | BadImageError | OSError


def pack(
    source: Path,
    dest: Path,
    short_side: int | None = SHORT_SIDE,
    quality: int = QUALITY,
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
    test_fraction: float = TEST_FRACTION,
) -> dict[str, Any]:
    """Write the images of ``source`` to the folder ``dest``, in the format of :mod:`r2d2fast.data.photographs.packed`.

    An image whose short side is longer than ``short_side`` is resized to it by the filter that evaluation uses, and encoded as a
    JPEG file with 4:2:0 chroma. A JPEG file that needs no resizing is copied as it is; an image of another kind is encoded in its
    size. Every image is decoded once, so damaged ones are found here.

    ``dest`` appears when all of it is on the disk. Until then the files are in ``dest`` + ``.partial``, which a run that is
    killed leaves behind and the next one begins anew.

    Args:
        source: in one of the layouts of ``tree.LAYOUTS``.
        dest: does not exist yet.
        short_side: pixels; None for original sizes.
        quality: of JPEG, 1 … 100.
        workers: processes that decode and encode; 0: this one.
        on_bad_image: ``"error"``: the first damaged image raises BadImageError. ``"skip"``: damaged images are left out, and
            listed in the header.
        test_fraction: see :func:`tree.read_tree`.

    Returns:
        The header, as ``pack.json`` has it.

    Raises DataError for a source that is no such layout, an image that cannot be read, or a ``dest`` that exists or cannot be
    written; LoaderError if a worker dies.
    """
    if is_packed(source):
        raise DataError(f"{source} is packed already; name the folder of the images themselves")
    if dest.exists():
        raise DataError(f"{dest} exists; remove it, or name another destination")
    if short_side is not None and short_side < 1:
        raise DataError(f"--short-side is {short_side}; accepted: 1 or more pixels")
    if not 1 <= quality <= 100:
        raise DataError(f"--quality is {quality}; accepted: 1 to 100")
    if workers < 0:
        raise DataError(f"--workers is {workers}; accepted: 0 or more")
    tree = read_tree(source, test_fraction)
    encode = _Encode(short_side, quality)
    with partial_folder(dest) as partial:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "short_side": short_side,
            "quality": quality,
            "classes": list(tree.class_names),
            "parts": {
                name: _write_part(partial, name, part, encode, workers, on_bad_image)
                for name, part in zip(PARTS, (tree.train, tree.test), strict=True)
            },
        }
        with writing(partial / HEADER):
            replace_file(partial / HEADER, (json.dumps(header, indent=1) + "\n").encode())
    return header


def _write_part(
    directory: Path, name: str, part: Part, encode: "_Encode", workers: int, on_bad_image: OnBadImage
) -> dict[str, Any]:
    """Write the images and the index of a part; its entry in the header."""
    kept: list[int] = []
    sizes: list[int] = []
    checksums: list[int] = []
    skipped: dict[str, str] = {}
    path = directory / f"{name}.images"
    # Around the closing, too, which writes what is left.
    with writing(path), open(path, "wb") as file:
        for sample, image in _encoded(part.files, encode, workers, name):
            if isinstance(image, bytes):
                file.write(image)
                kept.append(sample)
                sizes.append(len(image))
                checksums.append(zlib.crc32(image))
            elif isinstance(image, OSError):
                raise DataError(f"cannot read {part.files.names[sample]}: {image}") from image
            elif on_bad_image == "skip":
                skipped[image.name] = image.reason
            else:
                raise image
        file.flush()
        os.fsync(file.fileno())
    if len(part.files) and not kept:
        raise DataError(f"none of the {len(part.files)} images of part {name!r} can be decoded; {LAYOUTS}")
    names = Names.of(part.files.names[sample] for sample in kept)
    index = io.BytesIO()
    np.savez(
        index,
        ends=np.cumsum(sizes, dtype="<i8"),
        crc32=np.array(checksums, "<u4"),
        labels=part.labels[kept].numpy().astype("<i8"),
        names=names.text,
        name_ends=names.ends.astype("<i8"),
    )
    with writing(directory / f"{name}.npz"):
        replace_file(directory / f"{name}.npz", index.getvalue())
    return {
        "images": len(kept),
        "bytes": sum(sizes),
        "index_crc32": zlib.crc32(index.getvalue()),
        "skipped": skipped,
    }


def _encoded(files: Files, encode: "_Encode", workers: int, name: str) -> Iterator[tuple[int, _Packed]]:
    """Each sample with its bytes, in order, or what is wrong with it."""
    order = consecutive_batches(torch.arange(len(files)), _AT_ONCE)
    loaded = load_batches(_Load(files, encode), order, workers)
    for batch, images in track(
        zip(order, loaded, strict=True), f"packing {name}", len(order), disable=not sys.stderr.isatty()
    ):
        yield from zip(batch.samples.tolist(), images, strict=True)


@dataclass(frozen=True)
class _Encode:
    """An image file's bytes as they are packed."""

    short_side: int | None
    quality: int

    def __call__(self, data: bytes, name: str) -> bytes:
        pixels = decode(data, name)
        if self.short_side is not None and min(pixels.shape[:2]) > self.short_side:
            height, width, _ = pixels.shape
            pixels = (
                resized(pixels, resized_shape(height, width, self.short_side))[0].permute(1, 2, 0).contiguous().numpy()
            )
        elif is_jpeg(data):
            return data
        if max(pixels.shape) > 65500:
            raise BadImageError(
                name, f"{pixels.shape[1]} x {pixels.shape[0]} pixels are more than JPEG can hold (65500 a side)"
            )
        return simplejpeg.encode_jpeg(pixels, self.quality, "RGB", "420", fastdct=False)


@dataclass(frozen=True)
class _Load:
    """What the worker processes do."""

    files: Files
    encode: Callable[[bytes, str], bytes]

    def __call__(self, batch: Batch) -> list[_Packed]:
        images: list[_Packed] = []
        for sample in batch.samples.tolist():
            try:
                images.append(self.encode(bytes(self.files.read(sample)), self.files.names[sample]))
            except (BadImageError, OSError) as error:
                images.append(error)
        return images
