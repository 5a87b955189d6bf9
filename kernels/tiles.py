"""Which tile a row length takes. A table, not a search: nothing is timed, and nothing is compiled before its first use."""

from typing import NamedTuple

from torch import Tensor

ONE_READ = 8192
"""Rows up to this length stay in registers from their read to their write; longer ones are read twice (mse: three times)."""
PIECE = 4096
"""The columns of a longer row at a time: two programs then share a processor, and one computes while the other waits."""


class Tile(NamedTuple):
    rows: int
    block: int  # columns, a power of two
    warps: int
    span: int  # how much of the index a search takes at once


def tile_of(classes: int) -> Tile:
    """Eight elements of ŷ and ỹ a thread, sixteen from 4097 columns: they and their exponentials fit into its registers.

    At most eight rows: a thread of a search keeps something of each.
    """
    block = 1 << (classes - 1).bit_length() if classes <= ONE_READ else PIECE
    rows = min(max(256 // block, 1), 8)
    return Tile(rows, block, min(max(block // 256, 1), 16), 512 // rows)


def alignment(rows: Tensor) -> int:
    """The power of two, 16 at most, that divides the distance of rows: with it the compiler reads and writes 16 bytes at once.
    The strides themselves are no constants, so that a new one compiles nothing."""
    stride = rows.stride(0) | 16
    return stride & -stride
