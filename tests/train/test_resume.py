import json
import random
import shutil
import signal
import time

import pytest
from same_run import assert_same_run, metrics
from tiny_run import train_killed_at_write

from r2d2fast.train.checkpoint import CURRENT, PREVIOUS, TEMPORARY, VALUES, find_checkpoint, save_checkpoint
from r2d2fast.train.precision import Precision


def lines(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(start_run, directory):
    process = start_run("--resume", "--run-dir", directory)
    process.join()
    assert process.exitcode == 0


def interrupted(start_run, directory, after, *arguments):
    """A run killed when ``after`` epochs are in its metrics."""
    process = start_run("--run-dir", directory, *arguments)
    while lines(directory) < after:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def killed_at_write(start_run, directory, count):
    process = start_run("--run-dir", directory, count, target=train_killed_at_write)
    process.join()
    return process.exitcode


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_and_resumed_a_run_ends_as_if_left_alone(start_run, finished, tmp_path, seed):
    moments = random.Random(seed)
    directory = tmp_path / "run"
    # The second one with checkpoints within epochs, too: after each step and each batch predicted.
    minutes = ("10", "1e-9")[seed - 1]
    for after in sorted(moments.sample(range(10), 3)):
        process = start_run("--resume", "--run-dir", directory, "--checkpoint-minutes", minutes)
        while process.is_alive() and lines(directory) <= after:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(start_run, directory)
    assert_same_run(directory, finished)


def test_killed_before_file_operations_of_a_whole_run(start_run, finished, tmp_path, capsys):
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


def test_a_half_written_line_and_lines_after_the_checkpoint_go(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    interrupted(start_run, directory, 6)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 2, "epoch": 99}\n{"stage": 2, "epo')
    finish(start_run, directory)
    assert_same_run(directory, finished)


def test_lines_that_are_gone_come_back_from_the_checkpoint(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    interrupted(start_run, directory, 6)
    (directory / "metrics.jsonl").unlink()
    finish(start_run, directory)
    assert_same_run(directory, finished)


@pytest.fixture(scope="module")
def half_done(start_run, tmp_path_factory):
    """A run killed in the middle, with two checkpoints; for tests to copy."""
    directory = tmp_path_factory.mktemp("half") / "run"
    interrupted(start_run, directory, 5)
    shutil.rmtree(directory / TEMPORARY, ignore_errors=True)
    assert (directory / CURRENT).exists()
    assert (directory / PREVIOUS).exists()
    return directory


@pytest.fixture
def copy(half_done, tmp_path):
    return shutil.copytree(half_done, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "missing", "renamed away"])
def test_a_damaged_checkpoint_costs_one_epoch_and_nothing_else(copy, finished, train_here, capsys, monkeypatch, damage):
    def save(directory, *state):
        # The damaged one is gone, or it would now take the place of the good one.
        path, messages = find_checkpoint(directory)
        assert (path.name, messages) == (CURRENT, [])
        save_checkpoint(directory, *state)

    monkeypatch.setattr("r2d2fast.train.run.save_checkpoint", save)
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
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert train_here("--resume", "--run-dir", copy) == 1
    error = capsys.readouterr().err
    assert f"{copy / CURRENT} is damaged" in error
    assert f"{copy / PREVIOUS} is damaged" in error
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_killed_run_is_resumed_within_an_epoch(start_run, finished, tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    # Saves at every step, and dies in the middle of stage 2.
    process = start_run("--checkpoint-minutes", "1e-9", "--run-dir", directory)
    values = directory / CURRENT / VALUES
    while True:
        try:
            saved = json.loads(values.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        if len(saved["rows"]) >= 5 and saved["step"] in (1, 2):
            break
    process.kill()
    process.join()
    assert train_here("--resume", "--run-dir", directory) == 0
    output = capsys.readouterr().out
    assert "resumed after" in output
    assert_same_run(directory, finished)


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


def test_resuming_a_finished_run_says_so_and_trains_nothing(finished, train_here, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train_here("--resume", "--run-dir", finished) == 0
    assert "finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_that_lacks_only_its_results_is_finished_without_training(finished, tmp_path, train_here, monkeypatch):
    directory = shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "network.safetensors", "curves.png"):
        (directory / name).unlink()
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert train_here("--resume", "--run-dir", directory) == 0
    assert_same_run(directory, finished)
    assert (directory / "curves.png").exists()


def test_resume_where_there_is_no_run_starts_one(start_run, finished, tmp_path):
    finish(start_run, tmp_path / "deep" / "run")
    assert_same_run(tmp_path / "deep" / "run", finished)


def test_another_seed_ends_differently(start_run, finished, tmp_path):
    process = start_run("--run-dir", tmp_path / "run", "--seed", 1)
    process.join()
    assert process.exitcode == 0
    assert metrics(tmp_path / "run") != metrics(finished)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", finished)


def test_the_bank_in_a_file_ends_as_the_one_in_memory(start_run, finished, tmp_path):
    directory, file = tmp_path / "run", tmp_path / "bank"
    interrupted(start_run, directory, 6, "--bank-storage", file)
    # What the file holds does not count: the checkpoint does.
    file.write_bytes(b"\xff" * file.stat().st_size)
    process = start_run("--resume", "--run-dir", directory, "--bank-storage", file)
    process.join()
    assert process.exitcode == 0
    assert_same_run(directory, finished)


def test_where_auto_becomes_another_precision_it_is_said(start_run, train_here, tmp_path, capsys, monkeypatch):
    interrupted(start_run, tmp_path / "run", 6)
    # A GPU's, say.
    monkeypatch.setattr("r2d2fast.train.trainer.Precision", lambda _, device: Precision("bfloat16", device))
    assert train_here("--resume", "--run-dir", tmp_path / "run") == 0
    assert "--precision auto, float32 on the machine before, is bfloat16 on this one" in capsys.readouterr().out
