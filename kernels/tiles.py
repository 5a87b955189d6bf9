"""Which tile a row length takes. A table, not a search: nothing is timed, and nothing is compiled before its first use."""

from typing import NamedTuple

import torch
from torch import Tensor

ONE_READ = 8192
"""Rows up to this length stay in registers from their read to their write; longer ones are read twice (mse: three times)."""
PIECE = 4096
"""The columns of a longer row at a time: two programs then share a processor, and one computes while the other waits."""


class Tile(NamedTuple):
    rows: int
    block: int  # columns, a power of two
    warps: int
    span: int  # how much of the index find_occurrences() reads at once


def tile_of(classes: int) -> Tile:
    """Four elements of ŷ and ỹ a thread up to 128 columns, eight up to 4096, then sixteen: they, their exponentials and what a
    thread keeps of each row fit into its registers. Several rows have one warp: on AMD the ticket of :func:`step.sum_up` waits
    for the stores of its own wavefront alone.
    """
    block = 1 << (classes - 1).bit_length() if classes <= ONE_READ else PIECE
    rows = min(max(128 // block, 1), 4)
    return Tile(rows, block, min(max(block // 256, 1), 16), 512 // rows)


def alignment(rows: Tensor) -> int:
    """The power of two, 16 at most, that divides the distance of rows: with it the compiler reads and writes 16 bytes at once.
    The strides themselves are no constants, so that a new one compiles nothing."""
    stride = rows.stride(0) | 16
    return stride & -stride


def options_of(tile: Tile) -> dict[str, int | bool]:
    """How to compile a step: with a·b + c in one rounding, as the other kernels have it (off by default from Triton 3.10)."""
    options: dict[str, int | bool] = {"num_warps": tile.warps, "enable_fp_fusion": True}
    if tile.warps <= 4 and torch.version.hip is None:
        # Left to itself, NVIDIA's assembler takes fewer registers, for more programs at once, and spills some: 72 for narrow
        # tiles, 80 for four warps on sm_90 with Triton 3.8. 255 are all there are; 128 leave room for 16 warps.
        options["maxnreg"] = 255 if tile.warps < 4 else 128
    return options
