"""Whose run a directory holds: a run is never mixed with another one."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
from same_run import assert_same_run

from r2d2fast.train.methods import METHODS
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES, recipe_for
from r2d2fast.train.run_directory import locked, open_directory, read_config


def test_a_run_directory_that_holds_a_run_is_refused_without_resume(finished, train_here, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train_here("--run-dir", finished) == 2
    error = capsys.readouterr().err
    assert f"{finished} already holds a run" in error
    assert "--resume" in error
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, start_run, train_here, finished, capsys):
    directory = tmp_path / "run"
    process = start_run("--run-dir", directory)
    while not (directory / "checkpoint").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert train_here("--resume", "--run-dir", directory) == 2
    assert f"another process that trains has locked {directory / 'lock'}: wait for it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    process.kill()
    process.join()
    assert train_here("--resume", "--run-dir", directory) == 0
    assert_same_run(directory, finished)


def test_a_bank_file_that_another_process_trains_is_left_alone(tmp_path, start_run, train_here, capsys):
    bank = tmp_path / "bank"
    process = start_run("--run-dir", tmp_path / "one", "--bank-storage", bank)
    while not (tmp_path / "one" / "checkpoint").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    before = bank.read_bytes()
    assert train_here("--run-dir", tmp_path / "other", "--bank-storage", bank) == 2
    error = capsys.readouterr().err
    assert (
        f"another process that trains has locked {bank}.lock: wait for it or end it, or name another --bank-storage"
        in error
    )
    assert bank.read_bytes() == before
    assert not (tmp_path / "other").exists()
    process.kill()
    process.join()
    assert train_here("--run-dir", tmp_path / "other", "--bank-storage", bank) == 0


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, train_here, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train_here("--stages", "1", "--run-dir", tmp_path / "run") == 0


def test_loader_processes_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path):
    path = tmp_path / "lock"
    run = os.fork()
    if run == 0:
        with locked(path, Ranks(), "--run-dir"):
            loader = os.fork()
            if loader == 0:
                time.sleep(60)
            (tmp_path / "loader").write_text(str(loader))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(run, 0)
    loader = int((tmp_path / "loader").read_text())
    os.kill(loader, 0)  # it lives
    with locked(path, Ranks(), "--run-dir"):
        os.kill(loader, signal.SIGKILL)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.previous", "results.json", "metrics.jsonl"])
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_of_an_unknown_configuration_is_refused_and_left_alone(
    name, flags, finished, tmp_path, train_here, capsys
):
    copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
    copy(finished / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train_here(*flags, "--run-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} already holds a run ({name}) but no config.json" in error
    assert "restore config.json, or name another --run-dir" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoints_are_read_on_resuming_only(tmp_path, train_here, monkeypatch):
    searched = []
    monkeypatch.setattr(
        "r2d2fast.train.run.find_checkpoint", lambda directory: searched.append(directory) or (None, [])
    )
    assert train_here("--stages", "1", "--run-dir", tmp_path / "new") == 0
    assert searched == []
    assert train_here("--stages", "1", "--resume", "--run-dir", tmp_path / "resumed") == 0
    assert searched == [tmp_path / "resumed"]


def test_resuming_with_another_configuration_names_what_differs(finished, train_here, capsys):
    assert train_here("--resume", "--run-dir", finished, "--alpha", "0.2", "--stage3.lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "alpha is 0.1 there, 0.2 asked for; stage3.lr is 0.01 there, 0.5 asked for." in error
    assert "beta" not in error
    assert "--run-dir" in error


def test_what_says_where_and_how_to_run_is_not_compared(finished, train_here, capsys):
    flags = ("--device=cpu", "--workers=2", "--log-interval=7", "--checkpoint-minutes=3", "--data-dir=elsewhere")
    assert train_here("--resume", "--run-dir", finished, *flags, "--profile", "--bank-storage=device") == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_every_method_are_read_as_they_were_written(tmp_path, dataset, method):
    config = replace(recipe_for(dataset, tmp_path, method=method).config, data_dir=tmp_path, split=0)
    open_directory(tmp_path / "run", config)
    assert read_config(tmp_path / "run") == config


def test_a_run_of_fewer_stages_is_another_run(tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    assert train_here("--stages", "1", "--run-dir", directory) == 0
    results = json.loads((directory / "results.json").read_text())
    assert [entry["stage"] for entry in results["stages"]] == [1]
    assert results["test_error"] == results["stages"][0]["test_error"]
    assert (directory / "curves.png").exists()
    assert not (directory / "pseudo_labels.png").exists()
    assert train_here("--stages", "1", "--run-dir", directory, "--resume") == 0
    assert train_here("--stages", "1,2,3", "--run-dir", directory, "--resume") == 2
    assert "stages is [1] there, [1, 2, 3] asked for" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"alpha":', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "holds no JSON object"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, content, message, finished, tmp_path, train_here, capsys):
    for kept in ("config.json", "results.json"):
        (tmp_path / kept).write_bytes((finished / kept).read_bytes())
    (tmp_path / name).write_bytes(content)
    assert train_here("--resume", "--run-dir", tmp_path) == 2
    assert f"{tmp_path / name} {message}" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path, train_here, capsys):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        assert train_here("--run-dir", directory) == 1
        error = capsys.readouterr().err
        assert f"cannot write {directory}" in error
        assert "--run-dir" in error
