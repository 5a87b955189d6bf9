"""Ratios, comparisons, tables and the command."""

import json

import pytest
import torch

import bench.__main__ as command
from bench import measure, table
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Timing
from bench.passes import Passes
from bench.targets import compare
from bench.workload import Workload


def timing(threads, *, ours, eager, batch=1024, classes=1000):
    return Timing(batch, classes, threads, {"d2_step": ours, "a": eager})


def test_ratio_is_the_median_within_rounds():
    # A slow spell in the third round hits both; the ratio of the medians would be 25.
    one = timing(1, ours=[1.0, 2.0, 4.0], eager=[10.0, 50.0, 40.0])
    assert one.ratio("d2_step", "a") == 10


@pytest.mark.parametrize(("eager", "met"), [(8.4, False), (8.5, True)])
def test_target_of_one_thread(eager, met):
    (comparison,) = compare([timing(1, ours=[1.0], eager=[eager])])
    assert (comparison.target, comparison.met) == (8.5, met)


@pytest.mark.parametrize(("eager", "met"), [(8.9, False), (9.0, True)])
def test_target_of_two_threads_is_the_ratio_of_one(eager, met):
    comparisons = compare([timing(1, ours=[1.0], eager=[9.0]), timing(2, ours=[1.0], eager=[eager])])
    assert [(v.threads, v.target, v.met) for v in comparisons] == [(1, 8.5, True), (2, 9.0, met)]


def test_no_target_no_verdict():
    (comparison,) = compare([timing(1, ours=[1.0], eager=[9.0], batch=256)])
    assert (comparison.target, comparison.met) == (None, None)


def test_module_may_cost_half_as_much_again_as_a_scalar():
    slow = Timing(512, 10, 1, {"module": [1.6], "scalar": [1.0]})
    fast = Timing(512, 10, 1, {"module": [1.4], "scalar": [1.0]})
    assert [compare([one])[0].met for one in (slow, fast)] == [False, True]


def test_tables_state_rates_targets_and_comparisons():
    timings = [timing(1, ours=[1e-3], eager=[8e-3])]
    row = table.times(timings).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "1024 x 1000",
        "1",
        "r2d2fast.d2_step",
        "1000",
        "0.98",
        "16.4",
    ]
    row = table.comparisons(compare(timings)).splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["1024 x 1000", "1", "d2_step", "(a) eager autograd", "8.00", "≥ 8.50", "**not met**"]


def test_in_training_a_step_stands_between_two_passes_of_a_network(monkeypatch):
    workload = Workload(4, 10, rows=20)
    passes = Passes(workload)
    workload.logits.fill_(torch.nan)
    gradients = []

    def step(index):
        assert torch.isfinite(workload.logits).all(), "the forward pass has written the logits"
        return None, torch.ones_like(workload.logits)

    monkeypatch.setattr(torch.Tensor, "backward", lambda output, gradient: gradients.append((output.shape, gradient)))
    assert passes.sample(step) > 0
    ((shape, gradient),) = gradients
    assert shape == (4, 10)
    assert torch.equal(gradient, torch.ones(4, 10))


def test_command_prints_tables_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "QUICK", command.Settings(shapes=((12, 10),), threads=(1,), rounds=2, rows=20))
    monkeypatch.setattr(command, "step_memory", lambda name: 1.0)
    quick = {name: one for name, one in IMPLEMENTATIONS.items() if name not in ("b", "c")}  # without compiling
    monkeypatch.setattr(measure, "implementations", lambda classes: quick)
    command.main(quick=True, json=tmp_path / "bench.json")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert "(a) eager autograd" in printed
    assert f"- torch: {torch.__version__}" in printed
    for section in (result["in training"], result["back to back"]):
        (one,) = section["timings"]
        assert {len(samples) for samples in one["seconds"].values()} == {2}
        assert {c["baseline"] for c in section["comparisons"] if c["ours"] == "d2_step"} == set("ade")
    assert result["memory"] == {"d2_step": 1.0, "in place": 1.0, "module": 1.0}
