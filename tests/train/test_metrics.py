"""What --profile and --onnx write beside the results, and what they say where they cannot."""

import json
from types import SimpleNamespace

import pytest
from same_run import assert_same_run

from r2d2fast.train.errors import TrainingError
from r2d2fast.train.metrics import Metrics
from r2d2fast.train.profile import SKIPPED, TRACED, StepTracer
from r2d2fast.train.schedule import Epoch

ROWS = [
    {"stage": 1, "epoch": 0, "repredicted": False, "test_error": 50.0, "pseudo_label_error": None},
    {"stage": 2, "epoch": 0, "repredicted": True, "test_error": 12.5, "pseudo_label_error": 10.0},
]


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def test_rows_are_added_to_those_of_the_epochs_done_and_other_lines_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 99}\n{"ep')
    metrics = Metrics(tmp_path, ROWS[:1], tracker=None, writes=True)
    assert read(tmp_path) == ROWS[:1]
    metrics.append(ROWS[1])
    assert read(tmp_path) == ROWS


def test_a_rank_that_writes_nothing_leaves_the_file_alone_and_a_full_disk_is_an_error_of_ours(tmp_path):
    Metrics(tmp_path, ROWS[:1], tracker=None, writes=False).append(ROWS[1])
    assert list(tmp_path.iterdir()) == []
    metrics = Metrics(tmp_path, [], tracker=None, writes=True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=rf"cannot write {tmp_path}/metrics.jsonl: No space left.*--resume"):
        metrics.append(ROWS[0])


def test_without_its_package_a_flag_is_refused_before_anything_is_written(tmp_path, train_here, capsys, monkeypatch):
    monkeypatch.setattr("r2d2fast.train.run.find_spec", lambda name: None if name == "onnxscript" else name)
    assert train_here("--onnx", "--run-dir", tmp_path / "run") == 2
    assert '--onnx: onnxscript is not installed; pip install "r2d2fast[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- traces


def steps_traced(path):
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::convolution" for event in events)
    assert any("ConvolutionBackward" in event.get("name", "") for event in events)
    return sum(event.get("name") == "Optimizer.step#SGD.step" for event in events)


def test_a_trace_of_a_few_steps_of_each_stage(tmp_path, train_here, finished):
    directory = tmp_path / "run"
    assert list(finished.glob("trace*")) == []  # without the flag
    assert train_here("--profile", "--run-dir", directory) == 0
    # Stage 1 has four steps in all, stage 3 six, of two epochs; three go by first.
    for stage, steps in {1: 1, 2: TRACED, 3: 3}.items():
        assert steps_traced(directory / f"trace-stage{stage}.json") == steps
    assert_same_run(directory, finished)


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """A tracer, and when PyTorch's profiler is told what, as (what, stage, steps)."""
    tracer, log = StepTracer(tmp_path), []
    told = {
        name: lambda name=name: log.append((name, tracer.stage, tracer.steps)) for name in ("start", "step", "stop")
    }
    monkeypatch.setattr("torch.profiler.profile", lambda **_: SimpleNamespace(**told))
    return tracer, log


def test_predictions_and_evaluations_are_no_steps(traced):
    tracer, log = traced
    for epoch in [Epoch(2, number, 4, 0.1, None, 0, number == 0, False) for number in range(3)]:
        for step in (0, 0, 0, 1, 2, 3, 4, 4, 4):
            tracer.reached(epoch, step)
    steps = [("step", 2, number) for number in range(SKIPPED, SKIPPED + TRACED + 1)]
    assert log == [("start", 2, SKIPPED - 1), *steps, ("stop", 2, SKIPPED + TRACED)]
    tracer.close()
    assert len(log) == len(steps) + 2


def test_a_stage_that_ends_or_a_run_that_stops_writes_what_there_is(traced):
    tracer, log = traced
    for stage in (1, 2):
        epoch = Epoch(stage, 0, 4, 0.1, None, 0, False, True)
        for step in range(1, 5):
            tracer.reached(epoch, step)
    assert log[:4] == [("start", 1, 2), ("step", 1, 3), ("step", 1, 4), ("stop", 1, 4)]
    assert log[4:] == [("start", 2, 2), ("step", 2, 3), ("step", 2, 4)]
    tracer.close()
    assert log[7:] == [("stop", 2, 4)]


# --- ONNX


@pytest.mark.parametrize("again", [pytest.param([], marks=pytest.mark.slow), ["--onnx"]])
def test_an_export_that_fails_costs_no_training(again, tmp_path, train_here, finished, capsys, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setattr("r2d2fast.train.run.find_spec", lambda name: name)

    def fail(model, shape):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr("r2d2fast.train.run.export_onnx", fail)
    assert train_here("--onnx", "--run-dir", directory) == 1
    error = capsys.readouterr().err
    assert "--onnx: the export failed: RuntimeError('no such operator" in error
    assert str(directory / "network.safetensors") in error
    assert "--resume" in error
    assert not (directory / "results.json").exists()
    monkeypatch.setattr("r2d2fast.train.run.export_onnx", lambda model, shape: f"{shape}".encode())
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert train_here("--resume", "--run-dir", directory, *again) == 0
    assert_same_run(directory, finished)
    if again:
        assert (directory / "network.onnx").read_bytes() == b"(1, 8, 8)"
    else:
        assert not (directory / "network.onnx").exists()


@pytest.mark.slow
@pytest.mark.extra("onnx", "onnxscript")
def test_onnx_is_written_at_the_end(tmp_path, train_here):
    import onnx

    assert train_here("--onnx", "--stages", "1", "--run-dir", tmp_path / "run") == 0
    onnx.checker.check_model(onnx.load(tmp_path / "run" / "network.onnx"))
