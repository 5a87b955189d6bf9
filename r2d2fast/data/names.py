"""The names of many samples, in little memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """An immutable sequence of strings, held as UTF-8 in two arrays.

    A list of a million ``str`` would be copied page by page into every loader process: reading an object writes its
    reference count.

    Args:
        text: uint8, all strings one after another.
        ends: int64 ``[n]``, where each ends.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text
        self.ends = ends

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        """The sequence of ``names``; file names that are no text are kept (PEP 383)."""
        encoded = [name.encode(errors="surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return Names(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        start = self.ends[place - 1] if place else 0
        return self.text[start : self.ends[place]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))


class Numbers(Sequence[str]):
    """The names of ``count`` samples that have none: ``"0"``, ``"1"`` and so on, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        chosen = range(self._count)[place]
        return str(chosen) if isinstance(chosen, int) else [str(number) for number in chosen]
