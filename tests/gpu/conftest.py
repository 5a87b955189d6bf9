"""The device suite: ``pytest -m gpu``. Everywhere else its tests are skipped."""

import pytest
import torch

from r2d2fast import BackendError
from r2d2fast._backends import choose


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here (torch.cuda.is_available() is False)")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every GPU backend that runs here."""
    one = torch.empty(1, 2, device=device)
    try:
        choose(request.param, one, one)
    except BackendError as error:
        pytest.skip(str(error))
    return request.param
