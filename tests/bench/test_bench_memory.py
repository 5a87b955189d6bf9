"""A step makes one pass over memory: no temporary of size B x N, seen from outside the process's allocators."""

import sys

import pytest

from bench.memory import step_memory

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.slow,  # three processes that import PyTorch
]


@pytest.mark.parametrize("name", ["d2_step", "module"])
def test_a_step_adds_the_gradient_and_no_other_tensor(name):
    assert 0.95 < step_memory(name) < 1.15


def test_the_measurement_sees_temporaries():
    assert step_memory("a") > 4
