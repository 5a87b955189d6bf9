"""Random numbers as a function of what they are for: no generator, and so no state to save, order to keep or rank to know."""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), modulo 2⁶⁴.
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derive_seed(*numbers: int) -> int:
    """One seed, 0 … 2⁶³ − 1, of several numbers, each at least 0 and below 2⁶³."""
    seed = 0
    for number in numbers:
        seed = _mix_number((seed ^ number) + _STEP)
    return seed >> 1


def uniform(seed: int, keys: Tensor, count: int) -> Tensor:
    """``count`` numbers for each key, uniform in [0, 1): the same for the same ``seed`` and key, on every device.

    A resumed run, one on another number of ranks or loader processes, makes the same augmentations: each image that an
    epoch uses has a key of its own. Number j of a key does not depend on ``count``.

    Args:
        seed: of the run; any whole number, taken modulo 2⁶⁴.
        keys: int64 ``[B]``, any values.
        count: numbers wanted of each.

    Returns:
        float32 ``[B, count]``, multiples of 2⁻²⁴, on the device of ``keys``, which is not waited for.
    """
    # The seed is mixed in Python: a tensor made of it would have to be copied to the device, and waited for.
    mixed = _mix(keys ^ _signed(_mix_number(seed + _STEP)))
    columns = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    # 24 bits, all that a float32 below 1 can hold.
    return _shift(_mix(mixed[:, None] + columns * _signed(_STEP)), 40).float() * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, bijective on 64 bits."""
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


def _mix_number(number: int) -> int:
    """The same of a Python integer, which does not wrap around by itself."""
    z = number % 2**64
    z = (z ^ z >> 30) * _MIX1 % 2**64
    z = (z ^ z >> 27) * _MIX2 % 2**64
    return z ^ z >> 31


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; int64's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number
