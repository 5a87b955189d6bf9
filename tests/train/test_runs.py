"""Several runs and their table; runs that are only evaluated."""

import json
import os
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from same_run import assert_same_run, metrics, results

from r2d2fast.data import small_images
from r2d2fast.train import cli
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
    assert train_here("--runs", 2, "--run-dir", directory) == 0
    assert_table(capsys.readouterr().out, directory, [(0, 0), (1, 1)])
    assert_same_run(directory / "run1", two_runs / "run1")
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert before.items() <= after.items()


def test_one_of_several_runs_that_is_not_finished_goes_on_on_request_only(two_runs, train_here, tmp_path, capsys):
    directory = shutil.copytree(two_runs, tmp_path / "runs")
    (directory / "run1" / "results.json").unlink()
    assert train_here("--runs", 2, "--run-dir", directory) == 2
    error = capsys.readouterr().err
    assert f"{directory / 'run1'} already holds a run, which is not finished: go on with it by --resume" in error
    assert train_here("--runs", 2, "--run-dir", directory, "--resume") == 0
    assert_same_run(directory / "run1", two_runs / "run1")


def test_a_finished_run_of_other_settings_is_not_taken_for_one_of_several(two_runs, train_here, capsys):
    assert train_here("--runs", 2, "--alpha", 0.2, "--run-dir", two_runs) == 2
    assert "alpha is 0.1 there, 0.2 asked for" in capsys.readouterr().err


def test_a_first_run_is_the_first_of_several(train_here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_here("--stages", 1) == 0
    assert train_here("--stages", 1, "--runs", 2) == 0
    assert "runs/digits-labels50-split0-seed0 holds a finished run; nothing to do." in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == ["digits-labels50-split0-seed0", "digits-labels50-split1-seed1"]


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
    assert train_here("--eval-only", "--run-dir", finished, "--bank-storage", bank) == 0
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


def test_eval_only_without_a_checkpoint_says_so(train_here, tmp_path, capsys):
    assert train_here("--eval-only", "--run-dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} has no checkpoint to evaluate; name the --run-dir of a run that has begun" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--backbone", "torchvision:resnet18"), "backbone is small there, torchvision:resnet18 asked for"),
        (("--num-labels", 100, "--seed", 3), "num_labels is 50 there, 100 asked for; seed is 0 there, 3 asked for"),
        (("--dataset", "mnist"), "dataset is digits there, mnist asked for"),
        (("--flip",), "flip is False there, True asked for"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_an_error(flags, said, finished, train_here, capsys):
    before = content(finished)
    for command in ("--eval-only", "--resume"):
        assert train_here(command, "--run-dir", finished, *flags) == 2
        assert f"{finished} holds a run of another configuration: {said}. " in capsys.readouterr().err
    assert content(finished) == before


# --- settings of the run's directory


def test_the_directory_alone_says_which_run_it_is(finished, tmp_path, capsys, monkeypatch):
    """No flag of TINY, none of whose numbers is the recipe's."""
    error = results(finished)["test_error"]
    directory = shutil.copytree(finished, tmp_path / "run")
    (directory / "results.json").unlink()
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert cli.main(["--eval-only", f"--run-dir={directory}"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{printed(error)}{directory}"]
    assert cli.main(["--resume", f"--run-dir={directory}"]) == 0
    assert_same_run(directory, finished)


def test_flags_that_say_where_and_how_may_be_given_anew(finished, tmp_path):
    assert cli.parse(["--eval-only", f"--run-dir={finished}"]).data_dir == Path("data").absolute()
    config = cli.parse(["--eval-only", f"--run-dir={finished}", "--data-dir=elsewhere", "--workers=3", "--no-flip"])
    assert (config.data_dir, config.workers, config.flip) == (Path("elsewhere"), 3, False)
    assert config.stage2.lrs == (0.1, 0.05, 0.01)


def test_without_a_run_the_recipe_is_taken(tmp_path):
    for words in ([], ["--dataset=cifar10"]):
        fresh, resumed = (cli.parse([*words, f"--run-dir={tmp_path}", *more]) for more in ([], ["--resume"]))
        assert resumed == replace(fresh, resume=True)


def test_several_runs_have_the_settings_of_the_first_that_is_there(two_runs, tmp_path, capsys):
    directory = shutil.copytree(two_runs, tmp_path / "runs")
    for missing in (None, "run0"):
        if missing:
            shutil.rmtree(directory / missing)
        config = cli.parse(["--resume", "--runs=2", f"--run-dir={directory}"])
        assert (config.seed, config.split, config.stage1.epochs) == (0, 0, 4)
    assert cli.main(["--resume", f"--run-dir={two_runs}"]) == 2
    assert f"{two_runs} holds several runs: add --runs with their number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dataset", "nothing", "dataset is 'nothing'; accepted: digits,"),
        ("alpha", "much", "alpha is 'much', in place of 0.1 or the like"),
        ("stages", 1, "stages is 1, in place of (1, 2, 3) or the like"),
        ("flip", 1, "flip is 1, in place of False or the like"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_file(name, value, said, finished, tmp_path, capsys):
    directory = shutil.copytree(finished, tmp_path / "run")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert cli.main(["--resume", f"--run-dir={directory}"]) == 2
    assert f"{path}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--eval-only", "number 8 is '8' there and '9' here; name a data set with the same classes"),
        ("--resume", "the labelled samples are not those of"),
    ],
)
def test_a_data_set_of_other_classes_is_refused(command, said, finished, tmp_path, capsys, monkeypatch):
    directory = shutil.copytree(finished, tmp_path / "run")
    (directory / "results.json").unlink()
    original = small_images._digits
    monkeypatch.setitem(
        small_images._READERS,
        "digits",
        lambda *of: replace(original(*of), class_names=list("0123456798")),
    )
    assert cli.main([command, f"--run-dir={directory}"]) == 2
    assert said in capsys.readouterr().err


def test_a_run_s_own_configuration_repeats_it_in_a_directory_of_its_own(finished, tmp_path, monkeypatch, capsys):
    config = f"--config={finished / 'config.json'}"
    monkeypatch.chdir(tmp_path)
    for name in ("", "-2"):
        assert cli.main([config, "--threads=1"]) == 0
        assert_same_run(tmp_path / f"runs/digits-labels50-split0-seed0{name}", finished)
    changed = cli.parse([config, "--seed=3", "--stage2.epochs=6", "--no-flip"])
    assert (changed.seed, changed.split, changed.stage2.epochs, changed.stage1.epochs) == (3, 0, 6, 4)
    assert cli.main([config, "--resume"]) == 2
    assert "a run that goes on, or is evaluated, has settings of its own" in capsys.readouterr().err
    assert cli.main([config, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"--stage1\.epochs 4 \S*config", shown)
    (tmp_path / "other.json").write_text('{"dataset": "mnits"}')
    assert cli.main([f"--config={tmp_path / 'other.json'}"]) == 2
    assert "other.json: dataset is 'mnits'; accepted: digits," in capsys.readouterr().err
