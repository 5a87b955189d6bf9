import json
import os
import random
import signal
import time

import pytest
import torch
from tiny_run import train_with_a_checkpoint_each_epoch

from r2d2fast.train.checkpoint import CURRENT, load_checkpoint

TIMES = ("seconds", "images_per_second")


def flat(value, path=""):
    """All leaves of a nested state, by path, without the timings."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, entry in items if key not in TIMES for k, v in flat(entry, f"{path}/{key}").items()}
    return {path: value}


def assert_same_run(directory, other):
    state, expected = (flat(load_checkpoint(d)[0]) for d in (directory, other))
    assert state.keys() == expected.keys()
    for path, value in expected.items():
        same = torch.equal(state[path], value) if isinstance(value, torch.Tensor) else state[path] == value
        assert same, path
    metrics = [[flat(json.loads(line)) for line in (d / "metrics.jsonl").open()] for d in (directory, other)]
    assert metrics[0] == metrics[1]
    results = [flat(json.loads((d / "results.json").read_text())) for d in (directory, other)]
    assert results[0] == results[1]


def lines(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(start_run, directory):
    process = start_run("--resume", "--run-dir", directory)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_and_resumed_a_run_ends_as_if_left_alone(start_run, finished, tmp_path, seed):
    moments = random.Random(seed)
    directory = tmp_path / "run"
    for after in sorted(moments.sample(range(10), 3)):
        process = start_run("--resume", "--run-dir", directory)
        while process.is_alive() and lines(directory) <= after:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(start_run, directory)
    assert_same_run(directory, finished)


def kill_at(name, count):
    """Let the process kill itself just before its ``count``-th call of os.``name``."""
    original = getattr(os, name)
    left = [count]

    def replacement(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, replacement)


def train_killed_at_replace(arguments):
    *arguments, count = arguments
    kill_at("replace", int(count))
    train_with_a_checkpoint_each_epoch(arguments)


# The first three renames are of config.json, metrics.jsonl and checkpoint 1; then come two for each checkpoint. 23 is
# the second one of the last checkpoint; 24 is of curves.png, 26 of results.json.
@pytest.mark.parametrize("count", [1, 3, 12, 13, 23, 26])
def test_killed_between_the_steps_of_writing_a_file(start_run, finished, tmp_path, count):
    directory = tmp_path / "run"
    process = start_run("--run-dir", directory, count, target=train_killed_at_replace)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(start_run, directory)
    assert_same_run(directory, finished)
    assert not list(directory.glob("*.tmp"))


def interrupted(start_run, directory, after):
    """A run killed when ``after`` epochs are in its metrics."""
    process = start_run("--run-dir", directory)
    while lines(directory) < after:
        time.sleep(0.005)
    process.kill()
    process.join()


def test_a_half_written_line_and_lines_after_the_checkpoint_go(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    interrupted(start_run, directory, after=6)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 2, "epoch": 99}\n{"stage": 2, "epo')
    finish(start_run, directory)
    assert_same_run(directory, finished)


def test_a_damaged_checkpoint_costs_one_epoch_and_nothing_else(start_run, finished, tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    start_run("--run-dir", directory, 14, target=train_killed_at_replace).join()
    path = directory / CURRENT
    path.write_bytes(path.read_bytes()[:-100])
    assert train_here("--resume", "--run-dir", directory) == 0
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(directory, finished)


def test_where_the_only_checkpoint_is_damaged_nothing_starts_anew(start_run, tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    # Killed before the first rename for checkpoint 2.
    start_run("--run-dir", directory, 4, target=train_killed_at_replace).join()
    (directory / CURRENT).write_bytes(b"damaged")
    before = (directory / "metrics.jsonl").read_bytes()
    assert train_here("--resume", "--run-dir", directory) == 1
    assert f"{directory / CURRENT} is damaged" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_says_so_and_trains_nothing(finished, train_here, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert train_here("--resume", "--run-dir", finished) == 0
    assert "finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_resume_where_there_is_no_run_starts_one(start_run, finished, tmp_path):
    finish(start_run, tmp_path / "deep" / "run")
    assert_same_run(tmp_path / "deep" / "run", finished)


def test_another_seed_ends_differently(start_run, finished, tmp_path):
    process = start_run("--run-dir", tmp_path / "run", "--seed", 1)
    process.join()
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", finished)
