"""Backends under test, and what every test needs of them."""

from collections.abc import Iterator

import pytest
import torch

from r2d2fast._backends import native

INSTRUCTION_SETS = native.cpu.module.instruction_sets() if native.cpu.module else []


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs here, the C++ one with each instruction set this processor has."""
    name, _, instruction_set = request.param.partition("-")
    if name == "cpu":
        best = native.cpu.module.instruction_set()
        assert native.cpu.module.use_instruction_set(instruction_set)
        yield name
        native.cpu.module.use_instruction_set(best)
    else:
        yield name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change PyTorch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
