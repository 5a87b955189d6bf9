"""Mends what Triton's interpreter does otherwise than every GPU; for tests, before a kernel runs in it."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_bfloat16_to_nearest() -> None:
    """The interpreter cuts float32 off to bfloat16, where the hardware rounds to nearest even."""
    theirs = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return theirs(self, src, dst_type)
        word = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
