"""Several runs and their table; runs that are only evaluated."""

import os
import re
import shutil
import statistics

import pytest
from same_run import assert_same_run, metrics, results

from r2d2fast.train.checkpoint import CURRENT, VALUES

# --- --runs


@pytest.fixture(scope="module")
def two_runs(start_run, tmp_path_factory):
    """The directory of two runs."""
    directory = tmp_path_factory.mktemp("two") / "runs"
    process = start_run("--runs", 2, "--run-dir", directory)
    process.join()
    assert process.exitcode == 0
    return directory


def cells(output):
    """The table's rows."""
    lines = [line for line in output.splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def assert_table(output, directory, seeds):
    errors = [
        [entry["test_error"] for entry in results(directory / f"run{number}")["stages"]] for number in range(len(seeds))
    ]
    *rows, last = cells(output)
    assert rows == [
        [str(seed), str(split), *(f"{value:.2f}" for value in row)]
        for (seed, split), row in zip(seeds, errors, strict=True)
    ]
    columns = list(zip(*errors, strict=True))
    assert last == ["mean ± std", "", *(f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns)]
    assert "test error in percent at the end of each stage" in output


def test_each_run_is_the_one_of_its_own_seed_and_split(two_runs, finished, start_run, tmp_path):
    assert sorted(os.listdir(two_runs)) == ["run0", "run1"]
    assert_same_run(two_runs / "run0", finished)
    process = start_run("--seed", 1, "--run-dir", tmp_path / "run")
    process.join()
    assert_same_run(two_runs / "run1", tmp_path / "run")
    assert metrics(two_runs / "run1") != metrics(finished)
    assert (two_runs / "run1" / "labelled.txt").read_bytes() != (finished / "labelled.txt").read_bytes()


def test_the_table_of_finished_runs_needs_no_training(two_runs, train_here, capsys, monkeypatch):
    before = content(two_runs)
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert train_here("--runs", 2, "--resume", "--run-dir", two_runs) == 0
    output = capsys.readouterr().out
    assert output.count("holds a finished run; nothing to do") == 2
    assert_table(output, two_runs, [(0, 0), (1, 1)])
    assert train_here("--eval-only", "--runs", 2, "--run-dir", two_runs) == 0
    runs = [two_runs / "run0", two_runs / "run1"]
    assert capsys.readouterr().out.splitlines() == [f"{printed(results(run)['test_error'])}{run}" for run in runs]
    assert content(two_runs) == before


def test_only_what_is_missing_is_run(two_runs, train_here, tmp_path, capsys):
    directory = shutil.copytree(two_runs, tmp_path / "runs")
    shutil.rmtree(directory / "run1")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert train_here("--runs", 2, "--run-dir", directory) == 2  # as a single run
    assert f"{directory / 'run0'} already holds a run" in capsys.readouterr().err
    assert train_here("--runs", 2, "--resume", "--run-dir", directory) == 0
    assert_table(capsys.readouterr().out, directory, [(0, 0), (1, 1)])
    assert_same_run(directory / "run1", two_runs / "run1")
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert before.items() <= after.items()


def test_seeds_and_splits_count_from_those_given_and_directories_are_named_by_them(
    train_here, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert train_here("--runs", 2, "--seed", 4, "--split", 7, "--stages", 1) == 0
    assert sorted(os.listdir("runs")) == ["digits-labels50-split7-seed4", "digits-labels50-split8-seed5"]
    assert [row[:2] for row in cells(capsys.readouterr().out)] == [["4", "7"], ["5", "8"], ["mean ± std", ""]]
    split = tmp_path / "runs" / "digits-labels50-split7-seed4" / "labelled.txt"
    assert train_here("--stages", 1, "--split-file", split) == 0
    assert "mean" not in capsys.readouterr().out  # one run has no table
    assert (tmp_path / "runs" / "digits-labelled-seed0").is_dir()


# --- --eval-only


def content(directory):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in directory.rglob("*")
    }


def printed(error):
    return f"test error {error:.2f} %: the network in "


def test_eval_only_prints_the_error_of_the_last_checkpoint_and_changes_nothing(finished, train_here, capsys, tmp_path):
    before = content(finished)
    bank = tmp_path / "bank"  # of a run that goes on
    bank.write_bytes(b"\x11" * 1387 * 10 * 4)
    # The labels of the run are not asked for.
    assert (
        train_here("--eval-only", "--run-dir", finished, "--bank-storage", bank, "--num-labels", 100, "--seed", 3) == 0
    )
    output = capsys.readouterr().out
    assert output.splitlines() == [f"{printed(results(finished)['test_error'])}{finished}"]
    assert content(finished) == before
    assert os.listdir(tmp_path) == ["bank"]
    assert bank.read_bytes() == b"\x11" * 1387 * 10 * 4


def test_eval_only_of_a_run_in_the_middle_goes_back_over_a_damaged_checkpoint(finished, train_here, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "run")
    (directory / "results.json").unlink()
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    before = content(directory)
    assert train_here("--eval-only", "--run-dir", directory) == 0
    output = capsys.readouterr().out
    assert "is damaged: values.json" in output
    assert f"{printed(metrics(directory)[-2]['test_error'])}{directory}" in output
    assert content(directory) == before


def test_eval_only_without_a_checkpoint_or_with_another_network_says_so(finished, train_here, tmp_path, capsys):
    assert train_here("--eval-only", "--run-dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} has no checkpoint to evaluate; name the --run-dir of a run that has begun" in error
    assert not (tmp_path / "run").exists()
    assert train_here("--eval-only", "--run-dir", finished, "--backbone", "torchvision:resnet18") == 1
    error = capsys.readouterr().err
    assert re.search(rf"the checkpoint {finished / CURRENT} does not fit this run: .+", error)
