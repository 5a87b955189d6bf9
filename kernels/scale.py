"""out ← in·grad_output/grad_scale: the backward of the D2 loss."""

import triton
import triton.language as tl
from r2d2fast.kernels.batch import value_of
from torch import Tensor

BLOCK = 1024


@triton.jit
def scale_kernel(out, source, size, grad_output, grad_scale, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    # Rounded to nearest: a plain division may give a number beside 1 where the two are equal.
    factor = tl.div_rn(tl.load(grad_output), value_of(grad_scale))
    if IN_PLACE and factor == 1:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < size).to(tl.float32) * factor
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < size)


def scale(out: Tensor, source: Tensor, grad_output: Tensor, grad_scale: float | Tensor) -> None:
    """Both contiguous, of one dtype; where they are one tensor and the factor is 1, nothing is read or written."""
    programs = triton.cdiv(source.numel(), BLOCK)
    if programs:
        scale_kernel[(programs,)](
            out, source, source.numel(), grad_output, grad_scale, out is source, BLOCK, num_warps=4
        )
