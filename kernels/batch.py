"""What the programs of a launch need to know of a batch: whose rows they have, and which samples occur more than once.

A program has a tile of rows; whatever belongs to a row is a tensor ``[ROWS, 1]``.
"""

import triton
import triton.language as tl


@triton.jit
def value_of(scalar):
    """A number, or what lies where it points to: a captured graph then replays with what is there by that time."""
    if scalar.dtype.is_ptr():
        scalar = tl.load(scalar)
    return scalar


@triton.jit
def is_finite(x):
    # This looks at the bits, because Triton tells LLVM that there are no NaNs: no comparison of floats is safe to find one.
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def any_of(flags):
    return tl.max(flags.to(tl.int32)) > 0


@triton.jit
def locate(index, size, slots, samples, status, ROWS: tl.constexpr):
    """Of each row of this program: its position in the batch, whether that is inside, the sample, whether the bank has it, and
    its slot (−1 if not)."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = position < size
    sample = tl.load(index + position, mask=inside, other=-1).to(tl.int64)
    known = (sample >= 0) & (sample < samples)
    if any_of(inside & ~known):
        tl.atomic_or(status + 1, 1, sem="relaxed")
    slot = tl.load(slots + sample, mask=known, other=-1)
    return position, inside, sample, known, slot


@triton.jit
def find_occurrences(index, size, sample, position, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Whether a row's sample occurs again after it, and where it occurred last before it (−1: nowhere).

    Duplicates are settled in one launch: the program of a sample's last occurrence does all of them, so that whoever writes a
    row of the bank is the only one to have read it, and no program waits for another. For that each program reads the whole
    index, 8·B bytes from the L2 cache, beside the rows that it moves, 16·N bytes each.
    """
    latest = tl.full([ROWS, SPAN], -1, tl.int32)
    earlier = tl.full([ROWS, SPAN], -1, tl.int32)
    for begin in range(0, size, SPAN):
        other = begin + tl.arange(0, SPAN)[None, :]
        same = tl.load(index + other, mask=other < size, other=-1).to(tl.int64) == sample
        latest = tl.where(same, other, latest)
        earlier = tl.where(same & (other < position), other, earlier)
    return tl.max(latest, 1, keep_dims=True) > position, tl.max(earlier, 1, keep_dims=True)
