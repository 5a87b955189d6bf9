"""Banks, logits and comparisons that several test files share."""

from collections.abc import Container, Iterable

import pytest
import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank

CLASS_LOSSES = ("kl_reverse", "kl", "mse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slow_but(values: Iterable, fast: Container) -> list:
    """Parameters of a test: those in ``fast`` as they are, the others for ``pytest -m slow`` alone."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def make_bank(samples: int, classes: int, *, scale: float = 2.0, labelled_every: int = 3, **options) -> PseudoLabelBank:
    """A bank with every third sample labelled and random pseudo-logits; equal arguments and seeds give equal banks."""
    generator = torch.Generator().manual_seed(samples * 1009 + classes)
    labels = torch.full((samples,), -1)
    if labelled_every:
        labels[::labelled_every] = torch.randint(classes, (len(labels[::labelled_every]),), generator=generator)
    bank = PseudoLabelBank(labels, classes, **options)
    bank.pseudo_logits.copy_(torch.randn(bank.pseudo_logits.shape, generator=generator) * scale)
    return bank


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` around float64 ``values``."""
    info = torch.finfo(dtype)
    exponent = values.abs().clamp_min(info.smallest_normal).log2().floor()
    return info.eps * 2.0**exponent


def assert_near(actual: Tensor, expected: Tensor, *, slack: float | Tensor, name: str) -> None:
    """Within half a spacing of ``actual``'s dtype of the float64 value, and ``slack`` (absolute) for arithmetic."""
    allowed = 0.51 * spacing(expected.double(), actual.dtype) + slack
    excess = ((actual.double() - expected.double()).abs() - allowed).max() if expected.numel() else torch.tensor(-1.0)
    assert float(excess) <= 0, f"{name} is off by {float(excess):.3g} more than rounding allows"
