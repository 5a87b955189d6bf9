"""The baselines do the same work as we do: otherwise their times would say nothing."""

import pytest
import torch
from torch.testing import assert_close

from bench.implementations import IMPLEMENTATIONS, implementations
from bench.workload import ALPHA, BETA, LABEL_LR, Workload
from r2d2fast import reference

BATCH, CLASSES, ROWS = 12, 10, 20


@pytest.mark.parametrize(
    "name",
    # Compiling takes half a minute.
    [
        pytest.param(name, marks=pytest.mark.slow if name in "bc" else ())
        for name in sorted(IMPLEMENTATIONS.keys() - {"e", "scalar"})
    ],
)
def test_same_step_as_the_definition(name):
    """From the same beginning each has the loss, the gradient and the bank of the definition."""
    workload, expected = Workload(BATCH, CLASSES, ROWS), Workload(BATCH, CLASSES, ROWS)
    index = next(workload.indices)
    ours = reference.d2_step(expected.logits, index, expected.bank, alpha=ALPHA, beta=BETA, label_lr=LABEL_LR)
    loss, grad = IMPLEMENTATIONS[name].prepare(workload)(index)
    for actual, exact in ((loss, ours.loss), (grad, ours.grad), (workload.rows, expected.rows)):
        assert_close(actual.double(), exact.double(), rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_floor_reads_and_writes_the_same_places():
    workload = Workload(BATCH, CLASSES, ROWS)
    before, version = workload.rows.clone(), workload.rows._version
    (gradient,) = IMPLEMENTATIONS["e"].prepare(workload)(next(workload.indices))
    assert torch.equal(gradient, workload.logits)
    assert gradient.data_ptr() != workload.logits.data_ptr()
    assert workload.rows._version > version
    assert torch.equal(workload.rows, before)


def test_every_implementation_takes_part_where_overhead_rules_and_no_scalar_elsewhere():
    assert implementations(10).keys() == IMPLEMENTATIONS.keys()
    assert implementations(1000).keys() == IMPLEMENTATIONS.keys() - {"module", "scalar"}


def test_successive_steps_get_different_rows():
    workload = Workload(4, 2, rows=1000)
    assert len({tuple(next(workload.indices).tolist()) for _ in range(64)}) == 64
