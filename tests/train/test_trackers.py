"""What trackers are given, and that a run which goes on goes on in its own entry. Each is used as it is, without a network."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from r2d2fast.train.config import TrackerName
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.metrics import Metrics
from r2d2fast.train.trackers import _TRACKERS, start_tracker

ROOT = Path(__file__).parents[2]
ROW = {"stage": 2, "epoch": 0, "repredicted": True, "test_error": 12.5, "pseudo_label_error": None}
SETTINGS = {"alpha": 0.1, "dataset": "digits", "stages": (1, 2), "split_file": None}


def track(name, directory):
    """An epoch, and after a crash another one, in a process that knows the directory alone."""
    for epoch, error in enumerate((12.5, 10.0)):
        tracker = start_tracker(name, directory, SETTINGS, epoch)
        tracker.log({"test_error": error}, epoch)
        tracker.close(failed=epoch == 0)
    return json.loads((directory / "tracker.json").read_text())[name]


def test_every_tracker_has_a_name_in_the_configuration():
    assert {"none", *_TRACKERS} == set(TrackerName.__args__)


@pytest.mark.parametrize("name", _TRACKERS)
def test_without_its_package_a_tracker_is_refused_before_anything_is_written(
    name, tmp_path, train_here, capsys, monkeypatch
):
    monkeypatch.setattr("r2d2fast.train.run.find_spec", lambda package: None if package == name else package)
    assert train_here("--tracker", name, "--run-dir", tmp_path / "run") == 2
    assert f'--tracker {name}: {name} is not installed; pip install "r2d2fast[{name}]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_stops_the_run_and_one_that_fails_later_does_not(tmp_path, monkeypatch):
    def away(*arguments):
        raise OSError("no such host")

    monkeypatch.setitem(_TRACKERS, "wandb", away)
    with pytest.raises(ConfigError, match=r"--tracker wandb: OSError\('no such host'\).*WANDB_MODE=offline"):
        start_tracker("wandb", tmp_path, SETTINGS, 0)
    metrics = Metrics(tmp_path, [], SimpleNamespace(log=away), writes=True)
    with pytest.warns(UserWarning, match=r"did not take epoch 0 .*no such host.*metrics.jsonl has it"):
        metrics.append(ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ROW


def test_a_tracker_gets_the_numbers_of_each_new_epoch(tmp_path):
    logged = []
    metrics = Metrics(tmp_path, [ROW], SimpleNamespace(log=lambda *of_epoch: logged.append(of_epoch)), writes=True)
    metrics.append(ROW)
    assert logged == [({"repredicted": True, "test_error": 12.5}, 1)]


def test_what_tensorboard_is_given(tmp_path, monkeypatch):
    calls = []
    writer = SimpleNamespace(
        add_scalar=lambda *scalar: calls.append(scalar),
        flush=lambda: calls.append("flush"),
        close=lambda: calls.append("close"),
    )
    stub = SimpleNamespace(SummaryWriter=lambda *where, **options: calls.append((where, options)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    tracker = start_tracker("tensorboard", tmp_path, SETTINGS, 1)
    tracker.log({"test_error": 12.5}, 1)
    tracker.close(failed=False)
    # Steps are epochs of the run; those from the first new one on are taken back.
    assert calls == [((str(tmp_path),), {"purge_step": 1}), ("test_error", 12.5, 1), "flush", "close"]


@pytest.mark.extra("tensorboard")
def test_tensorboard_reads_every_metric_of_every_epoch(tmp_path, train_here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path / "run"
    # In two pieces: what the second writes follows on what the first did.
    assert train_here("--tracker", "tensorboard", "--run-dir", directory) == 0
    (directory / "results.json").unlink()
    shutil.rmtree(directory / "checkpoint")
    assert train_here("--tracker", "tensorboard", "--resume", "--run-dir", directory) == 0
    events = EventAccumulator(str(directory)).Reload()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    for name in rows[5].keys() - {"stage", "epoch", "seconds", "images_per_second", "outside_network"}:
        expected = {epoch: float(row[name]) for epoch, row in enumerate(rows) if row.get(name) is not None}
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == pytest.approx(expected, rel=1e-6), name


@pytest.mark.extra("wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    identity = track("wandb", tmp_path)
    runs = list(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert runs
    content = b"".join(path.read_bytes() for path in runs)
    for expected in (b"test_error", b"12.5", b"10", b"digits"):
        assert expected in content


@pytest.mark.extra("trackio")
def test_trackio_in_a_file(tmp_path):
    # In a process of its own, since trackio reads where to write while it is imported.
    code = f"from pathlib import Path; from tests.train.test_trackers import track; track('trackio', Path({str(tmp_path)!r}))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    with sqlite3.connect(tmp_path / "trackio" / "r2d2fast.db") as file:
        rows = file.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    identity = json.loads((tmp_path / "tracker.json").read_text())["trackio"]
    assert [(name, step, json.loads(metrics)) for name, step, metrics in rows] == [
        (identity, 0, {"test_error": 12.5}),
        (identity, 1, {"test_error": 10.0}),
    ]


@pytest.mark.extra("mlflow")
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    identity = track("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    assert [(one.step, one.value) for one in client.get_metric_history(identity, "test_error")] == [(0, 12.5), (1, 10)]
    entry = client.get_run(identity)
    assert entry.info.status == "FINISHED"
    assert entry.data.params == {"alpha": "0.1", "dataset": "digits", "stages": "(1, 2)", "split_file": "None"}
