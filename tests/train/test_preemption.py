import json
import os
import signal
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from same_run import assert_same_run
from tiny_run import train_terminated_twice

from r2d2fast.train.checkpoint import CURRENT, read_values
from r2d2fast.train.errors import PreemptedError
from r2d2fast.train.preemption import STEPS_BETWEEN_AGREEMENTS, Pauses
from r2d2fast.train.ranks import Ranks

# --- Pauses alone


class Watched:
    """Pauses that count checkpoints."""

    def __init__(self, ranks=None):
        self.saves = 0
        self.is_due = False
        self.pauses = Pauses(ranks or Ranks(), self.save, lambda: self.is_due)

    def save(self):
        self.saves += 1


def test_a_checkpoint_is_written_when_it_is_due_and_not_otherwise():
    watched = Watched()
    watched.pauses()
    assert watched.saves == 0
    watched.is_due = True
    watched.pauses()
    watched.pauses()
    assert watched.saves == 2


@pytest.fixture
def handler():
    """A handler of SIGTERM of the process's own."""

    def own(number, frame):
        raise AssertionError("the process's own handler")

    before = signal.signal(signal.SIGTERM, own)
    yield own
    signal.signal(signal.SIGTERM, before)


def test_after_sigterm_the_next_pause_saves_and_stops_with_status_143(handler):
    watched = Watched()
    with watched.pauses.watching():
        watched.pauses()
        signal.raise_signal(signal.SIGTERM)
        assert watched.saves == 0
        with pytest.raises(PreemptedError, match=r"SIGTERM: stopped, with a checkpoint.*--resume") as error:
            watched.pauses()
    assert error.value.status == 143
    assert watched.saves == 1
    assert signal.getsignal(signal.SIGTERM) is handler


def test_only_the_first_sigterm_is_heard():
    with Watched().pauses.watching():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ranks_ask_each_other_now_and_then_and_the_most_urgent_wish_counts():
    asked = []
    ranks = SimpleNamespace(count=2, largest=lambda wish: asked.append(wish) or max(wish, other))
    other = 0
    watched = Watched(ranks)
    for _ in range(STEPS_BETWEEN_AGREEMENTS - 1):
        watched.pauses()
    assert asked == []
    other = 1  # the other rank's clock says so
    watched.pauses()
    assert (asked, watched.saves) == ([0], 1)
    for _ in range(STEPS_BETWEEN_AGREEMENTS - 1):
        watched.pauses()
    other = 2  # the other rank is told to go
    with pytest.raises(PreemptedError):
        watched.pauses()
    assert (asked, watched.saves) == ([0, 0], 2)


# --- runs


@pytest.fixture
def before_pause(monkeypatch):
    """Calls a function with the trainer before every pause of a run."""

    def install(function):
        pause = Pauses.__call__

        def patched(pauses):
            function(pauses.save.__self__.trainer)
            pause(pauses)

        monkeypatch.setattr(Pauses, "__call__", patched)

    return install


def place(trainer):
    """Where a pause is: after a step, or after a batch that is predicted or evaluated."""
    if trainer.model.training:
        return "step"
    return "prediction" if trainer.step == 0 else "evaluation"


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_terminated_again_and_again_a_run_ends_as_if_left_alone(
    first, before_pause, train_here, finished, tmp_path, capsys
):
    directory = tmp_path / "run"
    left, places = first, []

    def terminate(trainer):
        nonlocal left
        left -= 1
        if left == 0:
            places.append(place(trainer))
            signal.raise_signal(signal.SIGTERM)

    before_pause(terminate)
    while (status := train_here("--resume", "--run-dir", directory)) == 143:
        assert "SIGTERM: stopped, with a checkpoint; the same command with --resume" in capsys.readouterr().err
        left = 4  # more than the three batches of a prediction, which begins anew
    assert status == 0
    assert len(places) >= 10
    assert set(places) == {"step", "prediction", "evaluation"}
    assert_same_run(directory, finished)


def test_the_time_of_an_epoch_counts_what_was_spent_before_it_was_resumed(before_pause, train_here, tmp_path):
    directory = tmp_path / "run"
    stopped = False

    def terminate_late(trainer):
        nonlocal stopped
        if not stopped and len(trainer.rows) == 2:
            stopped = True
            time.sleep(1)
            signal.raise_signal(signal.SIGTERM)

    before_pause(terminate_late)
    assert train_here("--stages", "1", "--run-dir", directory) == 143
    before = read_values(directory / CURRENT)
    assert before["seconds"] >= 1
    assert train_here("--stages", "1", "--resume", "--run-dir", directory) == 0
    seconds = [json.loads(line)["seconds"] for line in (directory / "metrics.jsonl").open()]
    assert seconds[:2] == [row["seconds"] for row in before["rows"]]
    assert seconds[2] > before["seconds"]


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_process_told_to_end_saves_ends_with_143_and_can_be_resumed(start_run, finished, tmp_path, epochs):
    directory = tmp_path / "run"
    metrics = directory / "metrics.jsonl"
    process = start_run("--run-dir", directory)
    while not metrics.exists() or metrics.read_text().count("\n") < epochs:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert not (directory / "results.json").exists()
    process = start_run("--resume", "--run-dir", directory)
    process.join()
    assert process.exitcode == 0
    assert_same_run(directory, finished)


def test_a_second_sigterm_ends_the_process_at_once(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    process = start_run("--run-dir", directory, target=train_terminated_twice)
    process.join()
    assert process.exitcode == -signal.SIGTERM
    process = start_run("--resume", "--run-dir", directory)
    process.join()
    assert process.exitcode == 0
    assert_same_run(directory, finished)


@pytest.fixture
def saved(monkeypatch):
    """(epochs, steps) of every checkpoint that is written."""
    from r2d2fast.train.run import save_checkpoint

    places = []

    def record(directory, tensors, values, ranks):
        places.append((len(values["rows"]), values["step"]))
        save_checkpoint(directory, tensors, values, ranks)

    monkeypatch.setattr("r2d2fast.train.run.save_checkpoint", record)
    return places


def test_checkpoints_within_epochs_are_those_asked_for_in_minutes(
    saved, before_pause, train_here, tmp_path, monkeypatch
):
    now = 1e6

    def a_minute_later(trainer):
        nonlocal now
        now += 60

    before_pause(a_minute_later)
    monkeypatch.setattr("r2d2fast.train.run.time", SimpleNamespace(monotonic=lambda: now))
    assert train_here("--run-dir", tmp_path / "run", "--stages", "1,2", "--checkpoint-minutes", "3.5") == 0
    # Epochs of stage 1 pause after the step and after the evaluation: two minutes, and one checkpoint at the end of each.
    # Those of stage 2 pause four times for steps and once for the evaluation; 4, 6 and 8 three times before for a prediction.
    assert saved == [
        *((epochs, 0) for epochs in (1, 2, 3, 4)),
        *((4, 1), (4, 4)),  # and none at the epoch's end, which is the next moment
        *((5, 4), (6, 0)),
        *((6, 1), (6, 4)),
        *((7, 4), (8, 0)),
        *((8, 1), (8, 4), (9, 0)),
    ]


def test_the_time_that_a_checkpoint_takes_does_not_count(before_pause, train_here, tmp_path, monkeypatch):
    now, pauses, within = 1e6, 0, []

    def a_minute_later(trainer):
        nonlocal now, pauses
        now, pauses = now + 60, pauses + 1

    def ten_minutes(directory, tensors, values, ranks):
        nonlocal now
        now += 600
        if values["step"]:
            within.append(pauses)

    before_pause(a_minute_later)
    monkeypatch.setattr("r2d2fast.train.run.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("r2d2fast.train.run.save_checkpoint", ten_minutes)
    assert train_here("--run-dir", tmp_path / "run", "--stages", "1,2", "--checkpoint-minutes", "3.5") == 0
    assert len(within) >= 5
    assert all(later - before >= 4 for before, later in pairwise(within))


def test_short_epochs_have_no_checkpoints_within(saved, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr("r2d2fast.train.run.SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    assert train_here("--run-dir", tmp_path / "run") == 0
    assert saved == [(4, 0), (9, 0), (11, 0)]  # the ends of stages


def test_a_diverged_network_never_takes_the_place_of_a_good_one(saved, train_here, tmp_path, capsys):
    directory = tmp_path / "run"
    flags = ("--run-dir", directory, "--stage2.lrs", "1e30,1e30,1e30", "--checkpoint-minutes", "1e-9")
    assert train_here(*flags) == 1
    error = capsys.readouterr().err
    assert "the loss is nan in stage 2, epoch 0, step" in error
    assert f"The last good checkpoint, after 4 epochs, is {directory / 'checkpoint'}" in error
    # Not after the four steps of the epoch: one of them made the network's numbers meaningless.
    assert (4, 0) in saved
    assert (4, 4) not in saved
