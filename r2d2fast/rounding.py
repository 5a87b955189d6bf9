"""Stochastic rounding of float32 to a 16-bit float, counter-based: the definition in PyTorch.

A step moves a pseudo-logit by label_lr·alpha/D times a difference of probabilities. Near convergence that is far below
the spacing of a 16-bit float, so rounding to nearest would stall the bank for good; rounding up with the probability
that the remainder says keeps the expectation exact. The bits come from Philox4x32-10 (Salmon et al., *Parallel Random
Numbers: As Easy as 1, 2, 3*, SC 2011), keyed by the bank's seed, counted by step and element: reproducible in any order of
evaluation and on any number of threads.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a 128-bit counter under a 64-bit key: four int64 tensors that hold 32-bit words each."""
    x0, x1, x2, x3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64; masking the arithmetic shift gives their unsigned upper half.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK32) ^ x1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ x3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return x0, x1, x2, x3


def random_bits(element: Tensor, step: int, seed: int) -> Tensor:
    """16 random bits for each element number (int64): word (e mod 8)/2 of block e/8, its lower half where e is even."""
    block, piece = element >> 3, element & 7
    low, high = torch.full_like(block, step & _MASK32), torch.full_like(block, (step >> 32) & _MASK32)
    words = torch.stack(philox((block & _MASK32, (block >> 32) & _MASK32, low, high), seed))
    word = words.gather(0, (piece >> 1).unsqueeze(0)).squeeze(0)
    return (word >> (16 * (piece & 1))) & 0xFFFF


def stochastic_round(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite float32 ``values`` to ``dtype``, up in magnitude with the probability that the dropped bits say.

    ``bits`` int64, the shape of ``values``, 0 … 65535. Values beyond the largest finite number of ``dtype`` saturate.
    """
    dropped = 23 - _MANTISSA_BITS[dtype]
    mask = (1 << dropped) - 1
    word = values.view(torch.int32).to(torch.int64)
    rounded = ((word + (bits & mask)) & ~mask).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 the spacing no longer shrinks with the value: it stays 2^-24.
        scaled = values.double().abs() * 2.0**24
        subnormal = ((scaled + bits.double() / 65536).floor() * 2.0**-24).copysign(values.double()).float()
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, rounded)
    return saturate(rounded, dtype)


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype``; what lies beyond its largest finite number becomes that number, NaN stays NaN."""
    largest = torch.finfo(dtype).max
    # From 2.15 on PyTorch refuses a bound that the values' own dtype cannot hold.
    wide = values.to(torch.promote_types(values.dtype, dtype))
    return wide.clamp(-largest, largest).to(dtype)
