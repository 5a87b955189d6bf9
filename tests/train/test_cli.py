import json
import os
import re
import resource
import signal

import pytest
import torch
from tiny_run import TINY

from r2d2fast.train import cli
from r2d2fast.train.recipes import RECIPES


def test_help_gives_every_flag_its_meaning_and_every_recipe_number_its_source(capsys, monkeypatch):
    # Wide enough that no flag named within a help text begins a line.
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    text = "\n".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    # A flag too long for its column has its help on the lines below.
    flags = {part.split()[0]: " ".join(part.split()) for part in re.split(r"^(?=--[a-z])", text, flags=re.M)[1:]}
    general = ["dataset", "seed", "split", "stages", "run-dir", "resume", "dry-run", "device"]
    assert {f"--{name}" for name in general} <= flags.keys()
    recipe = {flag: line for flag, line in flags.items() if flag.removeprefix("--") not in general}
    assert len(recipe) == 22
    for flag, line in recipe.items():
        assert any(source in line for source in ("paper", "reference implementation", "ours")), flag


def test_an_unknown_data_set_is_named_with_the_accepted_ones_and_the_way_out(capsys):
    assert cli.main(["--dataset", "mnits"]) == 2
    error = capsys.readouterr().err
    assert "--dataset mnits: unknown; accepted: digits." in error
    assert "--help" in error


@pytest.mark.parametrize("arguments", [["--stages", "1,x"], ["--stages"], ["--alpha", "much"], ["--alhpa", "0.1"]])
def test_what_is_no_flag_or_no_value_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert arguments[0].removeprefix("--") in capsys.readouterr().err


@pytest.mark.parametrize("stages", ["2", "1,3", "2,1", "1,2,3,4", "1,1"])
def test_stages_that_do_not_build_upon_each_other_are_refused(stages, tmp_path, capsys):
    assert cli.main(["--stages", stages, "--run-dir", str(tmp_path / "run")]) == 2
    assert f"--stages {stages}: accepted are 1, 1,2 and 1,2,3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-labels", "55"], "--num-labels: num_labels is 55; it must be a positive multiple of the 10 classes"),
        (["--num-labels", "5000"], "one class has only"),
        (["--device", "tpu"], "--device tpu: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--stage2.lrs", "0.1"], "--stage2.lrs 0.1: 1 learning rates"),
        (["--weight-decay", "nan"], "--weight-decay nan: must be at least 0, and finite"),
        (["--label-scale", "0"], "--label-scale 0.0: must be above 0"),
        (["--translate", "8"], "--translate 8: must be 0 to 7 pixels"),
        (["--seed", "-1"], "--seed -1: must be 0 to"),
        (["--seed", str(2**64)], f"--seed {2**64}: must be 0 to"),
        (["--split", "-1"], "--split -1: must be 0 to"),
        (["--stage1.batch", "0"], "--stage1.batch 0: must be at least 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_anything_is_written(flags, message, tmp_path, capsys):
    for dry_run in ([], ["--dry-run"]):
        assert cli.main([*flags, *dry_run, "--run-dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--num-labels", "1360"], ["--stage2.lrs", "0.1"], ["--stage3.batch", "0"]])
def test_one_stage_needs_no_settings_of_the_others(flags, tmp_path, train_here):
    assert train_here("--stages", "1", *flags, "--run-dir", tmp_path / "run") == 0


def test_training_without_momentum(tmp_path, train_here):
    assert train_here("--momentum", "0", "--run-dir", tmp_path / "run") == 0


def test_the_split_is_the_seed_unless_it_is_given():
    assert cli.parse(["--seed", "7"]).split == 7
    assert cli.parse(["--seed", "7", "--split", "3"]).split == 3
    assert cli.parse([]).split == 0


def test_every_number_of_the_recipe_can_be_overridden():
    config = cli.parse(["--alpha", "0.2", "--stage1.lr", "0.01", "--stage2.repredict-epochs", "", "--stages", "1,2"])
    assert (config.alpha, config.stage1.lr, config.stage2.repredict_epochs) == (0.2, 0.01, ())
    assert config.stages == (1, 2)
    assert config.stage2.lrs == RECIPES["digits"].stage2.lrs


def test_dry_run_prints_the_epochs_in_a_table_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([*TINY, "--dry-run"]) == 0
    output = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    assert cells == [
        ["1", "0-3", "", "1", "50", "0.05 to 0.017, cosine"],
        ["2", "0-1", "predict", "4", "300 + 32", "0.1"],
        ["2", "2-3", "repredict", "4", "300 + 32", "0.05"],
        ["2", "4-4", "repredict", "4", "300 + 32", "0.01"],
        ["3", "0-1", "predict", "3", "512", "0.01 to 0.00067, cosine"],
    ]
    assert "11 epochs, 30 steps." in output
    assert "Bank: 1387 x 10 pseudo-logits, 55480 bytes" in output
    assert os.listdir(tmp_path) == []


def test_a_run_directory_that_holds_a_run_is_refused_without_resume(finished, train_here, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train_here("--run-dir", finished) == 2
    error = capsys.readouterr().err
    assert f"{finished} already holds a run" in error
    assert "--resume" in error
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt", "results.json", "metrics.jsonl"])
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_of_an_unknown_configuration_is_refused_and_left_alone(
    name, flags, finished, tmp_path, train_here, capsys
):
    content = (finished / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    assert train_here(*flags, "--run-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} already holds a run ({name}) but no config.json" in error
    assert "restore config.json, or name another --run-dir" in error
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content


def test_checkpoints_are_read_on_resuming_only(tmp_path, train_here, monkeypatch):
    loaded = []
    monkeypatch.setattr("r2d2fast.train.run.load_checkpoint", lambda directory: loaded.append(directory) or (None, []))
    assert train_here("--stages", "1", "--run-dir", tmp_path / "new") == 0
    assert loaded == []
    assert train_here("--stages", "1", "--resume", "--run-dir", tmp_path / "resumed") == 0
    assert loaded == [tmp_path / "resumed"]


def test_resuming_with_another_configuration_names_what_differs(finished, train_here, capsys):
    assert train_here("--resume", "--run-dir", finished, "--alpha", "0.2", "--stage3.lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "alpha is 0.1 there, 0.2 asked for; stage3.lr is 0.01 there, 0.5 asked for." in error
    assert "beta" not in error
    assert "--run-dir" in error


def test_a_run_of_fewer_stages_is_another_run(tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    assert train_here("--stages", "1", "--run-dir", directory) == 0
    results = json.loads((directory / "results.json").read_text())
    assert [entry["stage"] for entry in results["stages"]] == [1]
    assert results["test_error"] == results["stages"][0]["test_error"]
    assert (directory / "curves.png").exists()
    assert not (directory / "pseudo_labels.png").exists()
    assert train_here("--stages", "1", "--run-dir", directory, "--resume") == 0
    assert train_here("--run-dir", directory, "--resume") == 2
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


def test_a_full_disk_during_training_costs_nothing_but_the_wait(tmp_path, train_here, start_run, finished, capsys):
    directory = tmp_path / "run"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert train_here("--run-dir", directory) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"cannot write {directory / 'checkpoint.pt'}: File too large" in error
    assert "--resume" in error
    assert train_here("--run-dir", directory, "--resume") == 0
    results = [json.loads((d / "results.json").read_text())["stages"] for d in (directory, finished)]
    assert results[0] == results[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where_and_what_is_kept(tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    assert train_here("--run-dir", directory, "--stage2.lrs", "1e30,1e30,1e30") == 1
    error = capsys.readouterr().err
    assert "the loss is nan in stage 2, epoch 0, step" in error
    assert f"The last good checkpoint, after 4 epochs, is {directory / 'checkpoint.pt'}" in error
    assert not (directory / "results.json").exists()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_ends_with_how_to_go_on(tmp_path, train_here, monkeypatch, capsys):
    # In the background of a shell SIGINT is ignored; this process may run there, and should receive it all the same.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("r2d2fast.train.run.append_metrics", lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        assert train_here("--run-dir", tmp_path / "run") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err


def test_results_metrics_and_files_of_a_finished_run(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert {"dataset", "split", "seed", "stages", "test_error", "seconds"} <= results.keys()
    assert (results["dataset"], results["split"], results["seed"], results["num_labels"]) == ("digits", 0, 0, 50)
    assert [(entry["stage"], entry["epochs"]) for entry in results["stages"]] == [(1, 4), (2, 5), (3, 2)]
    # Of the last epoch each, whatever the best was; plain D2's is that of the epoch before the first reprediction.
    errors = [row["test_error"] for row in rows]
    assert [entry["test_error"] for entry in results["stages"]] == [errors[3], errors[8], errors[10]]
    assert results["stages"][1]["d2_test_error"] == errors[5]
    assert results["test_error"] == errors[10]
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    for row in rows:
        assert {"stage", "epoch", "lr", "train_loss", "test_error", "images_per_second", "seconds"} <= row.keys()
        assert ("pseudo_confidence" in row) == (row["stage"] == 2)
    assert [row["repredicted"] for row in rows] == [n in (6, 8) for n in range(11)]
    for name in ("curves.png", "pseudo_labels.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "config.json").read_text())["stage2.repredict_epochs"] == [2, 4]


def test_lines_of_a_run_that_is_not_on_a_terminal(tmp_path, train_here, capsys):
    assert train_here("--run-dir", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("stage") and "loss" in line] == [
        "stage 1 epoch 4/4",
        "stage 2 epoch 3/5",
        "stage 2 epoch 5/5",
        "stage 3 epoch 2/2",
    ]
    assert lines[-4].startswith("stage 1: test error")
    assert str(tmp_path / "run") in lines[-1]


def test_the_number_of_threads_is_left_alone(tmp_path, train_here):
    before = torch.get_num_threads()
    assert train_here("--stages", "1", "--run-dir", tmp_path / "run") == 0
    assert torch.get_num_threads() == before
