"""What a run does between steps: SIGTERM, and checkpoints when they are due."""

import errno
import shutil
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console
from small_data import CONFIG

from r2d2fast.train import checkpoint
from r2d2fast.train.errors import PreemptedError, TrainingError
from r2d2fast.train.files import writing
from r2d2fast.train.run_callback import STEPS_BETWEEN_AGREEMENTS, RunCallback, Terminated
from r2d2fast.train.schedule import make_schedule


@pytest.fixture
def handler():
    """A handler of SIGTERM of the process's own."""

    def own(number, frame):
        raise AssertionError("the process's own handler")

    before = signal.signal(signal.SIGTERM, own)
    yield own
    signal.signal(signal.SIGTERM, before)


def test_one_sigterm_is_heard_and_a_second_one_ends_the_process(handler):
    terminated = Terminated()
    with terminated:
        assert not terminated.heard
        signal.raise_signal(signal.SIGTERM)
        assert terminated.heard
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture
def beside_another(tmp_path, monkeypatch):
    """A callback on one of two ranks; what it asks the other, which says yes as often as ``others`` says."""
    asked, saved = [], []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *state: saved.append(len(asked)))
    others = []
    monkeypatch.setattr(
        checkpoint, "state", SimpleNamespace(tensors=lambda trainer: {}, values=lambda trainer: {"losses": [0.5]})
    )
    ranks = SimpleNamespace(
        count=2,
        rank=1,
        any=lambda flag: asked.append(flag) or others.pop(0) or flag,
        on_first=lambda function: None,
    )
    trainer = SimpleNamespace(
        config=CONFIG,
        ranks=ranks,
        schedule=make_schedule(CONFIG, 8, 112),
        position=SimpleNamespace(epoch=2, step=1),
        history=[],
    )
    return RunCallback(trainer, tmp_path, Console(quiet=True)), trainer, others, asked, saved


def test_ranks_ask_each_other_now_and_then_and_all_save_and_stop_where_one_has_to(beside_another):
    callback, trainer, others, asked, saved = beside_another

    def steps(*answers):
        others[:] = answers
        for _ in range(STEPS_BETWEEN_AGREEMENTS):
            callback.between_steps(trainer)

    steps(False)
    assert (asked, saved) == ([False], [])
    steps(True, False)  # the other rank's clock says that a checkpoint is due
    assert (asked, saved) == ([False] * 3, [2])
    with pytest.raises(PreemptedError) as error:  # the other rank is told to go
        steps(True, True)
    assert error.value.status == 143
    assert saved == [2, 4]


# --- when checkpoints are written, in a run


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for a minute before whatever a run does between two steps."""
    clock = SimpleNamespace(now=1e6, moments=0)
    between_steps = RunCallback.between_steps

    def a_minute_later(callback, trainer):
        clock.now, clock.moments = clock.now + 60, clock.moments + 1
        between_steps(callback, trainer)

    monkeypatch.setattr(RunCallback, "between_steps", a_minute_later)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def saved(monkeypatch):
    """(epochs, steps) of every checkpoint that is written."""
    save, positions = checkpoint.save_checkpoint, []

    def record(directory, tensors, values, ranks):
        positions.append(tuple(values["position"]))
        save(directory, tensors, values, ranks)

    monkeypatch.setattr(checkpoint, "save_checkpoint", record)
    return positions


def test_checkpoints_within_epochs_are_those_asked_for_in_minutes(saved, clock, train_here, tmp_path):
    assert train_here("--run-dir", tmp_path / "run", "--stages", "1,2", "--checkpoint-minutes", "3.5") == 0
    # Epochs of stage 1 have a moment after the step and one after the evaluation: two minutes, and a checkpoint at the end of
    # each. Those of stage 2 have four for steps and one for the evaluation; 4, 6 and 8 three more before for a prediction.
    assert saved == [
        *((epochs, 0) for epochs in (1, 2, 3, 4)),
        *((4, 1), (4, 4)),  # and none at the epoch's end, which is the next moment
        *((5, 4), (6, 0)),
        *((6, 1), (6, 4)),
        *((7, 4), (8, 0)),
        *((8, 1), (8, 4), (9, 0)),
    ]


def test_the_time_that_a_checkpoint_takes_does_not_count(clock, train_here, tmp_path, monkeypatch):
    within = []

    def ten_minutes(directory, tensors, values, ranks):
        clock.now += 600
        if values["position"][1]:
            within.append(clock.moments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", ten_minutes)
    assert train_here("--run-dir", tmp_path / "run", "--stages", "1,2", "--checkpoint-minutes", "3.5") == 0
    assert len(within) >= 5
    assert all(later - before >= 4 for before, later in pairwise(within))


def test_short_epochs_have_no_checkpoints_within(saved, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    assert train_here("--run-dir", tmp_path / "run") == 0
    assert saved == [(4, 0), (9, 0), (11, 0)]  # the ends of stages


def test_a_diverged_network_never_takes_the_place_of_a_good_one(saved, train_here, tmp_path, capsys):
    directory = tmp_path / "run"
    flags = ("--run-dir", directory, "--stage2.lrs", "1e30,1e30,1e30", "--checkpoint-minutes", "1e-9")
    assert train_here(*flags) == 1
    error = capsys.readouterr().err
    assert "the loss is nan in stage 2, epoch 0, step" in error
    assert f"The last good checkpoint, after 4 epochs, is {directory / 'checkpoint'}." in error
    assert not (directory / "results.json").exists()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4
    # Not after the four steps of the epoch: one of them made the network's numbers meaningless.
    assert (4, 0) in saved
    assert (4, 4) not in saved


def test_a_run_that_diverges_at_once_names_no_checkpoint_as_there_is_none(train_here, tmp_path, capsys):
    directory = tmp_path / "run"
    assert train_here("--run-dir", directory, "--stage1.lr", "1e9") == 1
    error = capsys.readouterr().err
    assert error.rstrip().endswith("There is no checkpoint yet.")
    assert not (directory / "checkpoint").exists()


def test_a_directory_that_is_removed_under_a_run_leaves_no_good_checkpoints(train_here, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.fit", lambda trainer: shutil.rmtree(directory))
    assert train_here("--run-dir", directory) == 1
    error = capsys.readouterr().err
    assert f"cannot write {directory / 'labels.csv'}: No such file or directory" in error
    assert "There is no checkpoint to go on from: --resume begins anew." in error
    assert "are good" not in error


def test_checkpoints_that_are_there_are_named(tmp_path):
    for name in ("checkpoint", "checkpoint.previous"):
        (tmp_path / name / name).mkdir(parents=True)
        for path in (tmp_path / name / "metrics.jsonl", tmp_path / name / "checkpoint.tmp" / "values.json"):
            with pytest.raises(TrainingError) as raised, writing(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            assert f"Checkpoints written before, in {tmp_path / name}, are good" in str(raised.value)
