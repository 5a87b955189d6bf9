"""Random numbers as a function of what they are for: no generator, and so no state to save, order to keep or rank to know."""

import torch
from torch import Tensor

# SplitMix64's constants, as int64.
_STEP, _MIX1, _MIX2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform(seed: int, draws: Tensor, count: int) -> Tensor:
    """``count`` numbers for each draw, uniform in [0, 1): the same for the same ``seed`` and draw, on every device.

    A resumed run, one on another number of ranks or loader processes, makes the same augmentations: each image that an
    epoch uses has a draw number of its own.

    Args:
        seed: of the run.
        draws: int64 ``[B]``, any values.
        count: numbers wanted of each.

    Returns:
        float32 ``[B, count]``, on the device of ``draws``.
    """
    columns = torch.arange(1, count + 1, dtype=torch.int64, device=draws.device)
    key = _mix(_mix(torch.tensor(seed, device=draws.device) + _STEP) ^ draws)
    # 24 bits, all that a float32 below 1 can hold.
    return (_shift(_mix(key[:, None] + columns * _STEP), 40)).float() * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea & Flood, OOPSLA 2014), bijective on 64 bits."""
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; int64's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
