"""float32 to the bank's dtype: to nearest, or stochastically as ``r2d2fast/rounding.py`` defines it; never beyond its range."""

import triton
import triton.language as tl


@triton.jit
def random_words(block, step, seed):
    return tl.philox(
        seed.to(tl.int64),
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32),
    )


@triton.jit
def random_bits(first, step, seed, ROWS: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr):
    """16 random bits for each element of a tile ``[ROWS, BLOCK]`` whose rows begin with the elements number ``first``."""
    if CLASSES % 8 == 0:  # Eight elements share a block of words: one computation for all of them.
        w0, w1, w2, w3 = random_words((first >> 3) + tl.arange(0, BLOCK // 8)[None, :], step, seed)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        bits = tl.reshape(tl.join(words, words >> 16), [ROWS, BLOCK])
    else:
        element = first + tl.arange(0, BLOCK)[None, :]
        w0, w1, w2, w3 = random_words(element >> 3, step, seed)
        low, high = tl.where((element & 2) == 0, w0, w1), tl.where((element & 2) == 0, w2, w3)
        word = tl.where((element & 4) == 0, low, high)
        bits = tl.where((element & 1) == 0, word, word >> 16)
    return bits.to(tl.int32) & 0xFFFF


@triton.jit
def round_up_or_down(x, bits, DTYPE: tl.constexpr):
    dropped: tl.constexpr = 0xFFFF if DTYPE.is_bf16() else 0x1FFF
    rounded = ((x.to(tl.int32, bitcast=True) + (bits & dropped)) & ~dropped).to(tl.float32, bitcast=True)
    if DTYPE.is_fp16():  # of a subnormal the spacing stays 2^-24
        size = tl.floor(tl.abs(x) * 16777216.0 + bits * 0.0000152587890625) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(x < 0, -size, size), rounded)
    return rounded


@triton.jit
def clamp(x, DTYPE: tl.constexpr):
    largest: tl.constexpr = (
        65504.0 if DTYPE.is_fp16() else (3.3895313892515355e38 if DTYPE.is_bf16() else 3.4028234663852886e38)
    )
    return tl.minimum(tl.maximum(x, -largest), largest)


@triton.jit
def to_bank(
    x, first, updates, seed, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A float32 tile as elements of a bank of this dtype; ``first`` is the number of each row's first one, in rows of N."""
    x = clamp(x, DTYPE)
    if STOCHASTIC:
        bits = random_bits(first, tl.load(updates), seed, ROWS, BLOCK, CLASSES)
        x = round_up_or_down(x, bits, DTYPE)  # not beyond the largest number, which is of that dtype itself
    return x.to(DTYPE)
