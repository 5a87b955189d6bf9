"""A packed data set: a folder with the images of each part in one file, read through memory mapping.

The format, version 1. ``PART`` is ``train`` or ``test``; all numbers are little-endian.

===============  ===================================================================================================
``PART.images``  the image files (JPEG), one after another
``PART.npz``     NumPy arrays: ``ends`` int64 [n], where each image file ends; ``crc32`` uint32 [n], of each;
                 ``labels`` int64 [n], −1 for unknown; ``names`` uint8, UTF-8, one after another; ``name_ends`` int64 [n]
``pack.json``    ``format`` "r2d2fast-pack"; ``version``; ``short_side`` (null: original sizes); ``quality``; ``classes``;
                 ``parts``: of each ``images`` (n), ``bytes`` (of PART.images), ``index_crc32`` (of PART.npz) and ``skipped``, the
                 names of images left out because they are damaged, and why
===============  ===================================================================================================
"""

import io
import json
import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r2d2fast.data.errors import DataError
from r2d2fast.data.names import Names
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.tree import Part, Tree

FORMAT = "r2d2fast-pack"
VERSION = 1
HEADER = "pack.json"
PARTS = ("train", "test")


class PackedFiles:
    """The image files of one part, in one memory-mapped file (``Files``).

    Args:
        path: of the file.
        names: of the images.
        ends: int64 ``[n]``, where each image ends in the file.
        checksums: uint32 ``[n]``, CRC-32 of each.
    """

    def __init__(self, path: Path, names: Names, ends: np.ndarray, checksums: np.ndarray) -> None:
        self.names = names
        self._path = path
        self._ends = ends
        self._checksums = checksums
        with open(path, "rb") as file:
            # An empty file, of a part without images, cannot be mapped.
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(ends) else b"")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> memoryview:
        start = self._ends[sample - 1] if sample else 0
        data = self._bytes[start : self._ends[sample]]
        if zlib.crc32(data) != self._checksums[sample]:
            raise BadImageError(self.names[sample], f"{self._path} is damaged here (checksum); pack the images again")
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping cannot be sent to another process, but opened there again.
        return PackedFiles, (self._path, self.names, self._ends, self._checksums)


def is_packed(root: Path) -> bool:
    """Whether ``root`` is a folder that ``python -m r2d2fast.data.pack`` has written."""
    return (root / HEADER).is_file()


def open_packed(root: Path) -> Tree:
    """The images packed in ``root``. Raises DataError if its files are damaged, incomplete or of another version."""
    try:
        header = json.loads((root / HEADER).read_bytes())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        if header["version"] != VERSION:
            raise ValueError(f"its version is {header['version']}; this r2d2fast reads {VERSION}")
        train, test = (_open_part(root, name, header["parts"][name]) for name in PARTS)
        return Tree(header["classes"], train, test)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{root} is not a packed data set that can be used: {reason}. Pack the images again") from error


def _open_part(root: Path, name: str, described: dict[str, Any]) -> Part:
    path = root / f"{name}.images"
    index = (root / f"{name}.npz").read_bytes()
    if zlib.crc32(index) != described["index_crc32"]:
        raise ValueError(f"{name}.npz is damaged (checksum)")
    if path.stat().st_size != described["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {described['bytes']}")
    with np.load(io.BytesIO(index), allow_pickle=False) as arrays:
        names = Names(arrays["names"], arrays["name_ends"])
        files = PackedFiles(path, names, arrays["ends"], arrays["crc32"])
        return Part(files, torch.from_numpy(arrays["labels"]))
