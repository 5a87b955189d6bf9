"""Which parameters of a test are slow."""

from collections.abc import Container, Iterable

import pytest


def slow_but(values: Iterable, fast: Container) -> list:
    """Parameters of a test: those in ``fast`` as they are, the others for ``pytest -m slow`` alone."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
