"""Rows of the unlabelled samples ← logits (reprediction)."""

import triton
import triton.language as tl
from r2d2fast.kernels.batch import any_of, find_occurrences, is_finite, locate
from r2d2fast.kernels.rounding import clamp
from r2d2fast.kernels.step import row_of
from r2d2fast.kernels.tiles import alignment, tile_of
from torch import Tensor


@triton.jit(do_not_specialize=["logits_stride", "size", "rows_stride", "samples"])
def predict_kernel(
    logits,
    logits_stride,
    index,
    size,
    rows,
    rows_stride,
    slots,
    samples,
    status,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LOGITS_ALIGN: tl.constexpr,
    ROWS_ALIGN: tl.constexpr,
):
    position, inside, sample, _, slot = locate(index, size, slots, samples, status, ROWS)
    occurs_later, _ = find_occurrences(index, size, sample, position, ROWS, SPAN)
    due = inside & (slot >= 0) & ~occurs_later
    source = row_of(logits, position, logits_stride, LOGITS_ALIGN)
    target = row_of(rows, slot, rows_stride, ROWS_ALIGN)
    columns = tl.arange(0, BLOCK)[None, :]
    # Each row is read twice, so that nothing is written before all of it is known to be finite.
    bad = tl.zeros([ROWS, 1], tl.int32)
    for begin in range(0, CLASSES, BLOCK):
        valid = due & (begin + columns < CLASSES)
        x = tl.load(source + begin + columns, mask=valid, other=0).to(tl.float32)
        bad = tl.maximum(bad, tl.max((~is_finite(x)).to(tl.int32), 1, keep_dims=True))
    if any_of(bad):
        tl.atomic_or(status + 1, 2, sem="relaxed")
    for begin in range(0, CLASSES, BLOCK):
        valid = due & (bad == 0) & (begin + columns < CLASSES)
        x = tl.load(source + begin + columns, mask=valid).to(tl.float32)
        tl.store(target + begin + columns, clamp(x, rows.dtype.element_ty).to(rows.dtype.element_ty), mask=valid)


def predict(logits: Tensor, index: Tensor, rows: Tensor, slots: Tensor, status: Tensor) -> None:
    """``logits`` ``[B, N]`` and ``rows`` ``[U, N]`` with contiguous rows, ``index`` ``[B]`` contiguous."""
    size, classes = logits.shape
    tile = tile_of(classes)
    if size:
        predict_kernel[(triton.cdiv(size, tile.rows),)](
            logits, logits.stride(0), index, size, rows, rows.stride(0), slots, len(slots), status,
            classes, tile.rows, tile.block, tile.span, alignment(logits), alignment(rows), num_warps=tile.warps,
        )  # fmt: skip
