"""The baselines do the same work as we do: otherwise their times would say nothing."""

import pytest
import torch

from bench.implementations import IMPLEMENTATIONS, implementations
from bench.measure import prepare
from bench.workload import ALPHA, BETA, LABEL_LR, Workload
from r2d2fast import reference

BATCH, CLASSES, ROWS = 12, 10, 20


@pytest.fixture(scope="module")
def outcomes():
    """Of every implementation that computes: loss, gradient and bank after one step from the same beginning."""
    workload = Workload(BATCH, CLASSES, ROWS)
    start = workload.rows.clone()
    steps = prepare(workload)
    index = next(workload.indices)
    found = {}
    for name in steps.keys() - {"e", "scalar"}:
        workload.rows.data.copy_(start)
        loss, grad = steps[name](index)
        found[name] = (loss, grad, workload.rows.clone())
    workload.rows.data.copy_(start)
    expected = reference.d2_step(workload.logits, index, workload.bank, alpha=ALPHA, beta=BETA, label_lr=LABEL_LR)
    found["reference"] = (expected.loss, expected.grad, workload.rows.clone())
    return found


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS.keys() - {"e", "scalar"}))
@pytest.mark.parametrize("part", [0, 1, 2], ids=["loss", "gradient", "bank"])
def test_same_step_as_the_definition(outcomes, name, part):
    actual, expected = outcomes[name][part], outcomes["reference"][part]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


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
