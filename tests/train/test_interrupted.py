"""Whatever stops a run at whatever moment, the same command with --resume ends as if nothing had: to the last bit.

That the state of a trainer is whole at every moment is shown in test_trainer_state.py, that a checkpoint is whole or not there in
test_checkpoint.py; here whole runs are killed, terminated, interrupted, starved of disk, and find their files damaged.
"""

import io
import os
import random
import shutil
import signal
import sys
import time

import pytest
from same_run import assert_same_run, state
from tiny_run import train_killed_at_write

from r2d2fast.train import checkpoint
from r2d2fast.train.checkpoint import CURRENT, PREVIOUS, TEMPORARY, VALUES, find_checkpoint, save_checkpoint
from r2d2fast.train.metrics import Metrics
from r2d2fast.train.precision import Precision
from r2d2fast.train.run_callback import RunCallback
from tests.limits import file_size_limit


def lines(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(start_run, directory, *flags):
    process = start_run("--resume", "--run-dir", directory, *flags)
    process.join()
    assert process.exitcode == 0


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- killed, terminated


@pytest.mark.parametrize(
    ("kills", "minutes"), [(1, "1e-9"), *(pytest.param(3, m, marks=pytest.mark.slow) for m in ("1e-9", "10"))]
)
def test_killed_at_random_moments(start_run, finished, tmp_path, kills, minutes):
    """Also with checkpoints within epochs: after each step and each batch predicted."""
    moments = random.Random(kills)
    directory = tmp_path / "deep" / "run"
    for after in sorted(moments.sample(range(10), kills)):
        process = start_run("--resume", "--run-dir", directory, "--checkpoint-minutes", minutes)
        while process.is_alive() and lines(directory) <= after:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(start_run, directory)
    assert_same_run(directory, finished)


@pytest.mark.slow
def test_killed_with_moments_and_averaged_weights(start_run, tmp_path):
    """What AdamW and --ema keep is more than SGD's momentum: in each stage once, and with checkpoints within epochs."""
    flags = ("--optimizer=adamw", "--ema=0.9", "--checkpoint-minutes=1e-9")
    whole, directory = tmp_path / "whole", tmp_path / "run"
    finish(start_run, whole, *flags)
    moments = random.Random(0)
    for epochs in (1, 6, 9):
        process = start_run("--resume", "--run-dir", directory, *flags)
        while process.is_alive() and lines(directory) < epochs:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    _, tensors = state(directory)
    assert {"exp_avg", "exp_avg_sq"} <= {name.rpartition(".")[2] for name in tensors}
    assert any(name.startswith("averaged/") for name in tensors)
    finish(start_run, directory, *flags)
    assert_same_run(directory, whole)


@pytest.mark.slow
def test_killed_before_file_operations_of_a_whole_run(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    count, deaths = 1, 0
    while True:
        # Each process gets some operations further than the one before it: into another place of the next checkpoint.
        process = start_run("--resume", "--run-dir", directory, count, target=train_killed_at_write)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        count, deaths = count + 5, deaths + 1
    assert deaths >= 8
    assert_same_run(directory, finished)
    assert not list(directory.glob("**/*.tmp"))


@pytest.mark.slow
def test_a_process_told_to_end_saves_and_ends_with_143(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    process = start_run("--run-dir", directory)
    while lines(directory) < 5:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert not (directory / "results.json").exists()
    finish(start_run, directory)
    assert_same_run(directory, finished)


def test_terminated_again_and_again(train_here, finished, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    between_steps, left, places = RunCallback.between_steps, 1, []

    def terminate(callback, trainer):
        nonlocal left
        left -= 1
        if left == 0:
            evaluating = "evaluation" if trainer.position.step else "prediction"
            places.append("step" if trainer.model.training else evaluating)
            signal.raise_signal(signal.SIGTERM)
        between_steps(callback, trainer)

    monkeypatch.setattr(RunCallback, "between_steps", terminate)
    while (status := train_here("--resume", "--run-dir", directory)) == 143:
        assert "SIGTERM: stopped, with a checkpoint; the same command with --resume" in capsys.readouterr().err
        left = 4  # more than the three batches of a prediction, which begins anew
    assert status == 0
    assert len(places) >= 10
    assert set(places) == {"step", "prediction", "evaluation"}
    assert_same_run(directory, finished)


# --- interrupted, and what is found then


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run interrupted by ctrl-C after the sixth epoch, whose line is not written yet; for tests to copy."""
    from r2d2fast.train import cli
    from tests.train.tiny_run import TINY

    directory = tmp_path_factory.mktemp("half") / "run"
    append = Metrics.append

    def interrupt(metrics, row):
        if metrics.epochs == 5:
            signal.raise_signal(signal.SIGINT)
        append(metrics, row)

    # In the background of a shell SIGINT is ignored; this process may run there, and should receive it all the same.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Metrics, "append", interrupt)
            patch.setattr(checkpoint, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
            patch.setattr(checkpoint, "CHECKPOINT_SHARE", 0)
            patch.setattr(sys, "stderr", io.StringIO())
            assert cli.main([*TINY, "--threads=1", f"--run-dir={directory}"]) == 130
            assert "interrupted; the same command with --resume goes on" in sys.stderr.getvalue()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (directory / CURRENT).exists()
    assert (directory / PREVIOUS).exists()
    return directory


@pytest.fixture
def copy(half_done, tmp_path):
    return shutil.copytree(half_done, tmp_path / "run")


@pytest.mark.parametrize(
    "metrics", ["longer", *(pytest.param(m, marks=pytest.mark.slow) for m in ("as they were", "gone"))]
)
def test_metrics_are_those_of_the_checkpoint(metrics, copy, finished, train_here):
    path = copy / "metrics.jsonl"
    if metrics == "longer":  # by an epoch after the checkpoint, and half a line
        with path.open("a") as file:
            file.write('{"stage": 2, "epoch": 99}\n{"stage": 2, "epo')
    elif metrics == "gone":
        path.unlink()
    assert train_here("--resume", "--run-dir", copy) == 0
    assert_same_run(copy, finished)


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(d, marks=pytest.mark.slow) for d in ("missing", "renamed away"))]
)
def test_a_damaged_checkpoint_costs_one_epoch_and_nothing_else(copy, finished, train_here, capsys, monkeypatch, damage):
    def save(directory, *state):
        # The damaged one is gone, or it would now take the place of the good one.
        path, messages = find_checkpoint(directory)
        assert (path.name, messages) == (CURRENT, [])
        save_checkpoint(directory, *state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    tensors = copy / CURRENT / "__0_0.distcp"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    else:  # as a process killed between the two renames leaves it
        (copy / CURRENT).rename(copy / TEMPORARY)
    assert train_here("--resume", "--run-dir", copy) == 0
    said = {"cut": "is damaged: __0_0.distcp", "missing": "lacks __0_0.distcp", "renamed away": "resumed after"}
    assert said[damage] in capsys.readouterr().out
    assert_same_run(copy, finished)


def test_where_all_checkpoints_are_damaged_nothing_starts_anew(copy, train_here, capsys):
    for name in (CURRENT, PREVIOUS):
        (copy / name / VALUES).write_bytes(b"damaged")
    before = content(copy)
    assert train_here("--resume", "--run-dir", copy) == 1
    error = capsys.readouterr().err
    assert f"{copy / CURRENT} is damaged" in error
    assert f"{copy / PREVIOUS} is damaged" in error
    assert content(copy) == before


def test_what_the_bank_s_file_holds_does_not_count(copy, finished, train_here, tmp_path):
    """Only the checkpoint does."""
    file = tmp_path / "bank"
    file.write_bytes(b"\xff" * 1387 * 10 * 4)
    assert train_here("--resume", "--run-dir", copy, "--bank-storage", file) == 0
    assert_same_run(copy, finished)


def test_where_auto_becomes_another_precision_it_is_said(copy, train_here, capsys, monkeypatch):
    # A GPU's, say.
    monkeypatch.setattr("r2d2fast.train.trainer.Precision", lambda _, device: Precision("bfloat16", device))
    assert train_here("--resume", "--run-dir", copy) == 0
    assert "--precision auto, float32 on the machine before, is bfloat16 on this one" in capsys.readouterr().out


def test_other_labels_than_those_it_began_with_stop_a_run(copy, train_here, capsys):
    path = copy / "labelled.txt"
    first, *others = path.read_text().splitlines()
    name, label = first.split()
    path.write_text("\n".join([f"{name} {(int(label) + 1) % 10}", *others]) + "\n")
    assert train_here("--resume", "--run-dir", copy) == 2
    assert f"the labelled samples are not those of {path}, with which this run began" in capsys.readouterr().err
    path.write_text("no such sample\n")
    assert train_here("--resume", "--run-dir", copy) == 1
    assert f"{path}, line 1" in capsys.readouterr().err
    path.unlink()
    assert train_here("--resume", "--run-dir", copy) == 0
    assert path.read_text().splitlines() == [first, *others]


# --- full disks


# config.json has a kilobyte, a checkpoint 200.
@pytest.mark.parametrize(
    ("limit", "named"), [pytest.param(500, "config.json", marks=pytest.mark.slow), (50_000, "checkpoint.tmp")]
)
def test_a_full_disk_costs_nothing_but_the_wait(tmp_path, train_here, finished, capsys, limit, named):
    directory = tmp_path / "run"
    with file_size_limit(limit):
        assert train_here("--run-dir", directory) == 1
    error = capsys.readouterr().err
    assert f"cannot write {directory / named}: " in error
    assert "--resume" in error
    assert train_here("--run-dir", directory, "--resume") == 0
    assert_same_run(directory, finished)


def test_a_disk_that_is_full_at_the_end_costs_no_training(tmp_path, train_here, finished, capsys, monkeypatch):
    directory = shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "network.safetensors", "labelled.txt", "labels.csv"):
        (directory / name).unlink()
    for limit, named in (
        (100, "labelled.txt"),
        (10_000, "labels.csv"),
        (45_000, "curves.png"),
        (80_000, "network.safetensors"),
    ):
        with file_size_limit(limit):
            assert train_here("--run-dir", directory, "--resume") == 1
        error = capsys.readouterr().err
        assert f"cannot write {directory / named}: File too large" in error
        assert not (directory / "results.json").exists()
    (directory / "curves.png").unlink()
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert train_here("--run-dir", directory, "--resume") == 0
    assert_same_run(directory, finished)
    assert (directory / "curves.png").exists()
    # And now that it is finished.
    before = {path.name: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert train_here("--resume", "--run-dir", directory) == 0
    assert "finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
