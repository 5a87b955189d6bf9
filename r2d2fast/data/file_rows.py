"""Rows of an array in a mapped file, read as they are needed."""

import contextlib
import mmap
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2d2fast.data.errors import DataError


class FileRows:
    """Reads rows of a mapped array from its file, in place of touching its pages.

    Pages that are touched are part of the process's memory, and where ext4 keeps a file in large pieces Linux 6.18 brings in a
    whole one for a touch: rows in random order made all of a file of 2 GB resident, with MADV_RANDOM and MADV_NOHUGEPAGE, too.
    832 rows of 768 float16 take 1.3 ms this way; from pages 1.2 ms where they are given back now and then, 0.3 ms where not.

    Args:
        array: ``[M, D]``, of contiguous rows.
        mapped: the whole mapping that ``array`` is a view of.
    """

    def __init__(self, array: np.ndarray, mapped: np.memmap) -> None:
        address = array.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
        self._start = mapped.offset + address
        self._stride = array.strides[0]
        self._shape, self._dtype = array.shape, torch.from_numpy(np.empty(0, array.dtype)).dtype
        self._name = str(mapped.filename)
        self._file = open(self._name, "rb", buffering=0)  # noqa: SIM115 (open as long as this object is there)
        self._mapping: mmap.mmap = mapped.base  # type: ignore[assignment]

    @staticmethod
    def of(array: np.ndarray) -> "FileRows | None":
        """Of an array ``[M, D]`` of contiguous rows; None where it is not mapped, or a private copy (mode ``"c"``), or its file
        cannot be read, or is another one by now, or the system has no ``preadv``."""
        mapped = _mapped(array)
        if mapped is None or mapped.filename is None or not len(array) or not hasattr(os, "preadv"):
            return None
        with contextlib.suppress(OSError, DataError):
            rows = FileRows(array, mapped)
            ends = torch.tensor([0, len(array) - 1])
            if torch.equal(rows.read(ends).view(torch.uint8), torch.from_numpy(array[ends.numpy()]).view(torch.uint8)):
                return rows
        return None

    def read(self, index: Tensor) -> Tensor:
        """Rows ``index`` (int64 ``[B]``): ``[B, D]``, on the CPU. Raises DataError for a file that has become shorter."""
        rows = torch.empty(len(index), self._shape[1], dtype=self._dtype)
        size, file = self._shape[1] * rows.element_size(), self._file.fileno()
        for place, row in zip(rows.view(torch.uint8).numpy(), index.tolist(), strict=True):
            if os.preadv(file, (place,), self._start + row * self._stride) < size:
                raise DataError(f"{self._name} ends before row {row}; it has changed since it was opened: start again")
        return rows

    def forget(self) -> None:
        """Take the pages that have been touched out of the process's memory; they stay in the system's cache."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


def _mapped(array: np.ndarray) -> np.memmap | None:
    owner: Any = array
    while not isinstance(getattr(owner, "base", None), mmap.mmap):
        owner = getattr(owner, "base", None)
        if owner is None:
            return None
    return owner if isinstance(owner, np.memmap) and owner.mode != "c" else None
