"""How weights and learning rates rise and fall (Laine & Aila, ICLR 2017)."""

import math


def rise(progress: float, share: float) -> float:
    """exp(−5(1 − t)²), with t = ``progress`` / ``share`` up to 1, which it stays at; a share of 0 is risen at once."""
    t = min(progress / share, 1.0) if share else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def fall(progress: float, share: float) -> float:
    """1, and over the last ``share`` exp(−12.5 t²), with t from 0 to 1."""
    t = max(progress - (1 - share), 0.0) / share
    return math.exp(-12.5 * t**2)
