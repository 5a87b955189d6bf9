import json
import shutil
import signal
import time

import pytest
import torch
from matplotlib.figure import Figure

from r2d2fast.experiments import cli
from r2d2fast.train import cli as train_cli
from tests.processes import starting
from tests.train.tiny_run import TINY

DIGITS = ["--dataset", "digits", *TINY]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The same number of threads in every process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def without_pictures():
    """Curves and pseudo-labels as pictures are half of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def table1(tmp_path_factory, without_pictures):
    """The run directory of Table 1 with two seeds of tiny runs."""
    directory = tmp_path_factory.mktemp("table1") / "all"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(["table1", *DIGITS, "--seeds", "0,1", "--run-dir", str(directory)]) == 0
    torch.set_num_threads(before)
    return directory


def results(directory):
    return json.loads((directory / "results.json").read_text())


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    times = ("seconds", "images_per_second", "outside_network")
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


# --- what the runs are


@pytest.mark.slow
def test_table_1_holds_what_its_runs_have_measured(table1):
    content = json.loads((table1 / "digits" / "table1.json").read_text())
    names = ["d2", "repeated", "repredicted", "lowered", "r2d2"]
    assert [row["title"][0] for row in content["rows"]] == list("abcde")
    for row, name in zip(content["rows"], names, strict=True):
        runs = [results(table1 / "digits" / f"seed{seed}-split{seed}" / name) for seed in (0, 1)]
        assert row["test_error"]["runs"] == [one["test_error"] for one in runs]
        assert row["after_stage2"] == [one["stages"][0]["test_error"] for one in runs]
        assert row["test_error"]["difference"] is None
    assert "paper, on cifar10" in (table1 / "digits" / "table1.md").read_text()


@pytest.mark.slow
def test_all_variants_are_the_same_run_up_to_the_first_reprediction(table1):
    first = {}
    for name in ("d2", "repeated", "repredicted", "lowered", "r2d2"):
        rows = [row for row in metrics(table1 / "digits/seed1-split1" / name) if row["stage"] == 2]
        assert len(rows) == (2 if name == "d2" else 5)
        first[name] = without_times(rows)[:2]
        repredicted = [row["epoch"] for row in rows if row["repredicted"]]
        assert repredicted == ([2, 4] if name in ("repredicted", "r2d2") else [])
        lrs = [row["lr"] for row in rows]
        falls = name in ("lowered", "r2d2")
        assert lrs == [0.1, 0.1, 0.05, 0.05, 0.01][: len(rows)] if falls else set(lrs) == {0.1}
    assert all(rows == first["r2d2"] for rows in first.values())


@pytest.mark.slow
def test_stages_2_and_3_from_a_shared_stage_1_are_those_of_a_whole_run_to_the_last_bit(table1, tmp_path):
    directory = tmp_path / "whole"
    assert train_cli.main([*TINY, "--seed", "1", "--run-dir", str(directory)]) == 0
    shared = table1 / "digits/seed1-split1"
    parts = metrics(shared / "stage1") + metrics(shared / "r2d2")
    assert without_times(metrics(directory)) == without_times(parts)
    assert results(directory)["test_error"] == results(shared / "r2d2")["test_error"]


@pytest.mark.slow
def test_a_second_table_runs_only_what_the_first_has_not(table1, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "all"
    shutil.copytree(table1, directory)
    # Paths to stage 1's network are part of a run's settings.
    for path in directory.glob("digits/*/*/config.json"):
        path.write_text(path.read_text().replace(str(table1), str(directory)))
    trained = []
    train = cli.run
    monkeypatch.setattr(cli, "run", lambda config, place, *rest: trained.append(place) or train(config, place, *rest))
    command = ["table1", "table4", *DIGITS, "--seeds", "0", "--run-dir", str(directory)]
    assert cli.main([*command, "--resume"]) == 0
    assert trained == [directory / "digits/seed0-split0" / name for name in ("kl", "mse")]
    assert len((directory / "digits/table4.md").read_text().splitlines()) == 7
    trained.clear()
    assert cli.main([*command, "--resume"]) == 0
    assert trained == []
    # Without --resume nothing that is there is touched, and with other settings nothing is mixed.
    assert cli.main(command) == 2
    assert "already holds a run: go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--alpha", "0.2"]) == 2
    assert "another configuration: alpha is 0.1 there, 0.2 asked for" in capsys.readouterr().err
    assert trained == []


def test_labels_alone_all_labels_and_r2d2_with_splits(tmp_path, without_pictures):
    command = ["table7", *DIGITS, "--seeds", "5", "--splits", "2,3", "--run-dir", str(tmp_path)]
    assert cli.main(command) == 0
    content = json.loads((tmp_path / "digits/table7.json").read_text())
    assert [row["splits"] for row in content["rows"]] == [[2, 3]] * 3
    assert [row["seeds"] for row in content["rows"]] == [[5, 5]] * 3
    alone, every, r2d2 = (row["test_error"]["runs"] for row in content["rows"])
    assert results(tmp_path / "digits/seed5-split3/all-labels")["num_labels"] == 1437
    # 1437 labels against 50, in four epochs.
    assert max(every) < min(alone)
    assert len(r2d2) == 2


# --- resuming


def run_command(arguments):
    torch.set_num_threads(1)
    raise SystemExit(cli.main(arguments))


@pytest.mark.slow
def test_killed_twice_and_resumed_a_table_ends_as_if_left_alone(table1, tmp_path):
    """Killed in stage 1, which the others start from, and in a run that starts from it."""
    runs = tmp_path / "all/digits/seed0-split0"
    command = ["table1", *DIGITS, "--seeds", "0", "--run-dir", tmp_path / "all"]
    with starting("r2d2fast.experiments.cli") as start:
        for name, more in (("stage1", []), ("repeated", ["--resume"])):
            process = start(run_command, *command, *more)
            while not (runs / name / "config.json").exists() and process.is_alive():
                time.sleep(0.005)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert not (runs / name / "results.json").exists()
        process = start(run_command, *command, "--resume")
        process.join()
    assert process.exitcode == 0
    for name in ("stage1", "d2", "repeated", "repredicted", "lowered", "r2d2"):
        assert without_times(metrics(runs / name)) == without_times(metrics(table1 / "digits/seed0-split0" / name))
    table, whole = (json.loads((path / "digits/table1.json").read_text()) for path in (tmp_path / "all", table1))
    for row, other in zip(table["rows"], whole["rows"], strict=True):
        assert row["test_error"]["runs"] == other["test_error"]["runs"][:1]


# --- the dry run


@pytest.mark.slow
def test_a_dry_run_lists_the_runs_with_their_times_says_what_is_finished_and_leaves_nothing(
    table1, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    command = [*DIGITS, "--dry-run", "--run-dir"]
    assert cli.main(["table1", "table4", "figure2", *command, str(tmp_path / "all"), "--seeds", "4"]) == 0
    text = capsys.readouterr().out
    assert "10 runs with digits" in text
    names = ["stage1", "d2", "repeated", "repredicted", "lowered", "r2d2", "kl", "mse", "lenet2d-stage1", "lenet2d-d2"]
    lines = [line for line in text.splitlines() if "seed4-split4/" in line]
    assert [line.split()[1] for line in lines] == [f"seed4-split4/{name}" for name in names]
    # Stages, epochs, steps: 1387 unlabelled samples make 4 batches of 300, 1437 samples 3 of 512 in stage 3.
    assert [line.split()[3:8:2] for line in lines[:3]] == [["1", "4", "4"], ["2,3", "4", "14"], ["2,3", "7", "26"]]
    assert "for what is not finished" in text
    assert not (tmp_path / "all").exists()
    assert cli.main(["table1", *command, str(table1), "--seeds", "0,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("finished" in line) for line in lines if "/r2d2" in line] == [True, False]
    assert cli.main(["table1", *command, str(table1), "--stage2.lrs", "0.1"]) == 2
    assert "--stage2.lrs 0.1: 1 learning rates, 2 repredictions" in capsys.readouterr().err


# --- command lines that cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "table9: no experiment; accepted, before the flags: table1, table2"),
        ([], "nothing: no experiment; accepted, before the flags: table1"),
        (["--alpha", "0.2", "table1"], "nothing: no experiment"),
        (["table1", "--dataset", "mnits"], "--dataset mnits: unknown; accepted: digits, mnist"),
        (["table1", "--seed", "1"], "--seed: a flag of single runs; here: --seeds"),
        (["table1", "--split_file=x"], "--split-file: a flag of single runs; here: --splits"),
        (["table1", "--stages", "1"], "--stages: a flag of single runs"),
        (["table1", "--seeds", "0,1", "--splits", "0,1,2"], "--seeds 0,1: must be one number, or 3"),
        (["table1", "--seeds", "1,1"], "--seeds 1,1: must be different numbers"),
        (["table1", "--seeds=-1"], "--seeds -1: must be different numbers, from 0 on"),
        (["table1", "--dataset", "mnist"], "with and without repredictions, but the recipe of mnist has none"),
        (["table7", "--data-dir", "no/such/place"], "no/such/place"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    for dry_run in ([], ["--dry-run"]):
        assert cli.main([*arguments, *dry_run, "--run-dir", str(tmp_path / "all")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0,x"], ["--alhpa", "0.1"], ["--stage2.lrs"]])
def test_what_is_no_flag_or_no_value_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["table1", "--dataset", "digits", *arguments])
    assert exit_info.value.code == 2
    assert arguments[0].removeprefix("--") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "repetitions"),
    [
        ([], [(0, 0), (1, 1), (2, 2)]),
        (["--seeds", "3,4"], [(3, 3), (4, 4)]),
        (["--splits", "5,6"], [(5, 5), (6, 6)]),
        (["--seeds", "0,1,2", "--splits", "7"], [(0, 7), (1, 7), (2, 7)]),
        (["--seeds", "3", "--splits", "0,1"], [(3, 0), (3, 1)]),
        (["--seeds", "3,4", "--splits", "1,0"], [(3, 1), (4, 0)]),
    ],
)
def test_seeds_and_splits(flags, repetitions):
    assert cli.parse(["table1", *flags]).repetitions == repetitions


def test_each_experiment_has_the_papers_data_set_unless_another_is_named():
    configs = cli.parse(["all", "--alpha", "0.2"]).configs
    others = {"table5": "imagenet", "table6": "cifar100", "table8": "svhn", "figure2": "mnist"}
    expected = {f"table{number}": "cifar10" for number in (1, 2, 3, 4, 7)} | others
    assert {name: base.dataset for name, base in configs.items()} == expected
    assert {base.alpha for base in configs.values()} == {0.2}
    assert {base.dataset for base in cli.parse(["all", "--dataset", "digits"]).configs.values()} == {"digits"}
