"""What a step waits for by the harness' clock (cuda_host/clock.h): a change that adds a round trip to memory fails here.

The clock counts waiting, by the latencies published for an H100; arithmetic it does not see, nor bandwidth. Its cycles compare
variants of these kernels with one another and are a prediction of no device.
"""

from typing import NamedTuple

import pytest
import torch

from r2d2fast import d2_step
from r2d2fast.testing import make_bank
from tests.cuda_host.backend import on_the_host
from tests.cuda_host.host import Host, Report

pytestmark = pytest.mark.usefixtures("one_thread")


class Waiting(NamedTuple):
    trips: int
    """Round trips to memory, one after the other, in the longest chain."""
    cycles: int


# By batch, classes, and whether samples are repeated; csrc/README.md has what they were before, and why they are what they are.
EXPECTED = {
    (512, 10, False): Waiting(6, 2720),
    (512, 10, True): Waiting(8, 4450),
    (512, 1000, False): Waiting(6, 2970),
    (512, 1000, True): Waiting(8, 5840),
    (1024, 1000, False): Waiting(6, 2980),
    (1024, 1000, True): Waiting(8, 5900),
    (256, 8192, False): Waiting(6, 3390),
    (256, 8192, True): Waiting(9, 7250),
}
DTYPES = (torch.float32, torch.bfloat16)


def run(host: Host, batch: int, classes: int, repeated: bool, dtype: torch.dtype) -> Report:
    """A step of samples of which a quarter is labelled; or the last one has occurred once before, far away, and
    the one before it twice, nearby."""
    torch.manual_seed(0)
    bank = make_bank(batch, classes, labelled_every=4, dtype=dtype)
    index = torch.randperm(batch)
    if repeated:
        index[[batch // 8, -1]] = 1
        index[[-4, -3, -2]] = 2
    with on_the_host(host, "forward") as reports:
        d2_step(torch.randn(batch, classes).to(dtype), index, bank, backend="cuda")
    return reports[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case[:2] != (512, 10))) for case in EXPECTED]
)
def test_the_longest_chain(cuda_host: Host, case: tuple[int, int, bool], dtype: torch.dtype) -> None:
    report, expected = run(cuda_host, *case, dtype), EXPECTED[case]
    assert report.trips == expected.trips
    # A twentieth depends on what shares a line with what, and so on where PyTorch puts it.
    assert report.cycles == pytest.approx(expected.cycles, rel=0.06)


def test_a_repeated_sample_at_most_doubles_it() -> None:
    for classes in (10, 1000):
        assert EXPECTED[512, classes, True].cycles <= 2 * EXPECTED[512, classes, False].cycles
