"""The command line, and what a run leaves and says."""

import json
import os
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch

from r2d2fast.train import cli
from r2d2fast.train.config import Config, Stage1, Stage2, Stage3
from r2d2fast.train.recipes import RECIPES, flags

# --- the command line


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_help_all_gives_every_flag_its_meaning_and_says_where_the_sources_are(dataset, capsys, monkeypatch):
    # Narrow enough for one box below another, wide enough that no flag named within a help text begins a line.
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--dataset", dataset, "--help-all"])
    assert exit_info.value.code == 0
    text = "\n".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    head, *parts = re.split(r"^(?=--[a-z])", text, flags=re.MULTILINE)
    assert "--dry-run" in head
    # A flag too long for its column has its help on the lines below.
    lines = {part.split()[0]: " ".join(part.split()) for part in parts}
    on = [name for name, value in flags(RECIPES[dataset].config).items() if value is True]
    off = {name: ".no-".join(name.rsplit(".")) if "." in name else f"no-{name}" for name in on}
    names = {off.get(name, name).replace("_", "-") for name in flags(RECIPES[dataset].config)}
    assert lines.keys() == {f"--{name}" for name in names}
    for line in lines.values():
        meaning = re.fullmatch(r"--\S+ (?:[A-Z{]\S* )?(.+\.) \(default: .*\).*", line)
        assert meaning, line
        assert len(meaning[1].split()) >= 4, line


def test_help_is_short_fits_the_terminal_and_names_the_way_to_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--dataset", "cifar10", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 80
    assert re.findall(r"^.{0,2}--([a-z]\S+)", text, re.MULTILINE) == [
        name.replace("_", "-") for name in cli.FIRST_FLAGS
    ]
    assert "--help-all explains all" in " ".join(text.split())
    assert "(default: 4000)" in text
    # One paragraph, whose lines end where the terminal does: that of --dataset has four lines in the source.
    _, *of_dataset = re.split("--(?:dataset STR|data-dir)", text)[1].splitlines()
    assert min(len(line.rstrip("|│ ")) for line in of_dataset[:-3]) > 60


# Tells when PyTorch is imported, by an interrupt from the keyboard.
INTERRUPTED_AT_TORCH = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
class AtTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtTorch())
runpy.run_module("r2d2fast.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [(["--help"], 0, ""), (["--device", "cpu"], 130, "python -m r2d2fast.train: interrupted\n")],
)
def test_help_needs_no_pytorch_and_an_interrupt_while_it_is_imported_prints_no_traceback(arguments, status, error):
    command = [sys.executable, "-c", INTERRUPTED_AT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …\nframe 1"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has"),
    ],
)
def test_where_no_memory_is_left_the_message_says_what_to_lower(error, capsys):
    def act():
        raise error

    assert cli.exit_status("prog", act) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prog: out of memory (")
    for way_out in ("--stage1.batch", "--image-size", "--bank-dtype bfloat16", "--bank-storage"):
        assert way_out in line


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        cli.exit_status("prog", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_who_stops_reading_gets_no_traceback():
    command = [sys.executable, "-m", "r2d2fast.train", "--help-all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


def test_an_unknown_data_set_is_named_with_the_accepted_ones_and_the_way_out(capsys):
    assert cli.main(["--dataset", "mnits"]) == 2
    error = capsys.readouterr().err
    accepted = (
        "digits, mnist, fashion-mnist, svhn, cifar10, cifar100, imagenet, folder, embeddings, torchvision:NAME, hf:NAME"
    )
    assert f"--dataset mnits: unknown; accepted: {accepted}." in error
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
        (["--num-labels", "5"], "--num-labels: num_labels is 5; it must be at least 10, one for each class"),
        (["--num-labels", "5000"], "--num-labels: num_labels 5000 asks for 500 samples of class 8, which has only 139"),
        (["--num-labels-per-class", "4,4"], "--num-labels-per-class: num_labels 4,4 has 2 numbers for 10 classes"),
        (["--device", "mps"], "--device mps: no such device; accepted here: auto, cpu"),
        (["--device", "cuda:99"], "--device cuda:99: no such device; accepted here: auto, cpu"),
        (["--stage2.lrs", "0.1"], "--stage2.lrs 0.1: 1 learning rates"),
        (["--weight-decay", "nan"], "--weight-decay nan: must be at least 0, and finite"),
        (["--label-scale", "0"], "--label-scale 0.0: must be above 0"),
        (["--translate", "8"], "--translate 8: must be 0 to 7 pixels"),
        (["--seed", "-1"], "--seed -1: must be 0 to"),
        (["--seed", str(2**64)], f"--seed {2**64}: must be 0 to"),
        (["--split", "-1"], "--split -1: must be 0 to"),
        (["--seed", str(2**62 - 1), "--runs", "2"], f"--seed {2**62 - 1}: must be 0 to {2**62 - 2}"),
        (["--stage1.batch", "0"], "--stage1.batch 0: must be at least 1"),
        (["--runs", "0"], "--runs 0: must be at least 1"),
        (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
        (["--checkpoint-minutes", "0"], "--checkpoint-minutes 0.0: must be above 0"),
        (["--backbone", "resnet8"], "--backbone resnet8: "),
        (["--backbone", "convlarge"], "--backbone convlarge: "),
        (["--pretrained", "nowhere.safetensors"], "nowhere.safetensors cannot be read: No such file or directory"),
        (["--pretrained", "weights.npy"], "weights.npy is no file of weights by its name"),
        (["--split-file", "nowhere.txt"], "cannot read the split file nowhere.txt: No such file or directory"),
        (["--bank-storage", "/nowhere/bank"], "--bank-storage /nowhere/bank: cannot make the bank file"),
        (
            ["--bank-storage", "pined"],
            "--bank-storage pined: accepted: device, pinned on a GPU, or a file: ./pined would be",
        ),
        (["--bank-storage", "pined"], "; did you mean pinned?"),
        (
            ["--bank-storage", "ram"],
            "--bank-storage ram: accepted: device, pinned on a GPU, or a file: ./ram would be one",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_anything_is_written(flags, message, tmp_path, capsys):
    for dry_run in ([], ["--dry-run"]):
        assert cli.main([*flags, *dry_run, "--run-dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_cuda_graphs_are_refused_before_data_are_looked_for(tmp_path, capsys):
    flags = ["--cuda-graphs", "--device", "cpu", "--dataset", "cifar10", "--data-dir", str(tmp_path / "nowhere")]
    assert cli.main([*flags, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--cuda-graphs needs a GPU; leave it out on a CPU" in capsys.readouterr().err


def test_the_recipe_is_the_data_sets_and_its_numbers_can_be_overridden():
    for dataset, recipe in RECIPES.items():
        assert flags(cli.parse(["--dataset", dataset])) == {**flags(recipe.config), "split": 0}
    config = cli.parse(["--alpha", "0.2", "--stage1.lr", "0.01", "--stage2.repredict-epochs", "", "--stages", "1,2"])
    assert (config.alpha, config.stage1.lr, config.stage2.repredict_epochs) == (0.2, 0.01, ())
    assert config.stages == (1, 2)
    assert config.stage2.lrs == RECIPES["digits"].config.stage2.lrs
    assert cli.parse(["--dataset=cifar10", "--no-flip"]).flip is False
    kinds = [type(part) for part in (config, config.stage1, config.stage2, config.stage3)]
    assert kinds == [Config, Stage1, Stage2, Stage3]


def test_the_split_is_the_seed_unless_it_is_given():
    assert [cli.parse(words).split for words in ([], ["--seed=3"], ["--seed=3", "--split=1"])] == [0, 3, 1]


@pytest.mark.parametrize("flags", [["--num-labels", "1360"], ["--stage2.lrs", "0.1"], ["--stage3.batch", "0"]])
def test_one_stage_needs_no_settings_of_the_others(flags, tmp_path, train_here):
    assert train_here("--stages", "1", *flags, "--run-dir", tmp_path / "run") == 0


def test_training_without_momentum(tmp_path, train_here):
    assert train_here("--momentum", "0", "--run-dir", tmp_path / "run") == 0


def test_labels_by_class_and_by_shares(tmp_path, train_here):
    numbers = [5, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    for flag, expected in (
        (f"--num-labels-per-class={','.join(map(str, numbers))}", numbers),
        ("--num-labels-per-class=4", [4] * 10),
        ("--num-labels=55", None),
    ):
        directory = tmp_path / flag
        assert train_here("--stages", "1", flag, "--run-dir", directory) == 0
        labels = [int(line.split()[1]) for line in (directory / "labelled.txt").read_text().splitlines()]
        counts = [labels.count(number) for number in range(10)]
        assert counts == expected if expected else (sum(counts), set(counts)) == (55, {5, 6})
        assert json.loads((directory / "results.json").read_text())["num_labels"] == sum(counts)
    config = cli.parse(["--num-labels-per-class=4"])
    assert str(cli.run_directory(config, 0)) == "runs/digits-labels4-per-class-split0-seed0"


def test_all_labels_there_are(tmp_path, train_here):
    directory = tmp_path / "run"
    assert train_here("--stages", "1", "--num-labels", "0", "--run-dir", directory) == 0
    assert len((directory / "labelled.txt").read_text().splitlines()) == 1437
    assert train_here("--stages", "1", "--num-labels", "0", "--run-dir", directory, "--eval-only") == 0


# --- what a run leaves and says


def test_results_metrics_and_files_of_a_finished_run(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert (results["dataset"], results["split"], results["seed"], results["num_labels"]) == ("digits", 0, 0, 50)
    assert results["bad_images"] == 0
    assert results["versions"]["torch"] == torch.__version__
    assert [(entry["stage"], entry["epochs"]) for entry in results["stages"]] == [(1, 4), (2, 5), (3, 2)]
    # Of the last epoch each, whatever the best was; plain D2's is that of the epoch before the first reprediction.
    errors = [row["test_error"] for row in rows]
    assert [entry["test_error"] for entry in results["stages"]] == [errors[3], errors[8], errors[10]]
    assert results["stages"][1]["d2_test_error"] == errors[5]
    assert results["test_error"] == errors[10]
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert sum(entry["seconds"] for entry in results["stages"]) == pytest.approx(results["seconds"])
    for entry, part in zip(results["stages"], (rows[:4], rows[4:9], rows[9:]), strict=True):
        assert entry["images_per_second"] in [row["images_per_second"] for row in part]
        assert 0 <= entry["outside_network"] < 1
    for row in rows:
        assert {"stage", "epoch", "lr", "train_loss", "test_error", "images_per_second", "seconds"} <= row.keys()
        assert ("pseudo_confidence" in row) == (row["stage"] == 2)
    assert [row["repredicted"] for row in rows] == [n in (6, 8) for n in range(11)]
    for name in ("curves.png", "pseudo_labels.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "config.json").read_text())["stage2.repredict_epochs"] == [2, 4]
    assert len((finished / "labelled.txt").read_text().splitlines()) == 50
    assert not list(finished.rglob("*.tmp"))


def test_lines_of_a_run_that_is_not_on_a_terminal(tmp_path, train_here, capsys):
    assert train_here("--run-dir", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("stage") and "loss" in line] == [
        "stage 1 epoch 4/4",
        "stage 2 epoch 3/5",
        "stage 2 epoch 5/5",
        "stage 3 epoch 2/2",
    ]
    for stage, line in enumerate(lines[-5:-2], start=1):
        assert re.fullmatch(
            rf"stage {stage}: test error \d+\.\d\d % after \d epochs( \(before R2 \d+\.\d\d %\))?; "
            r"\d+ s, \d+ images/s, \d+ % of the time outside the network",
            line,
        )
    assert lines[-1] == f"To label others: python -m r2d2fast.predict {tmp_path / 'run'} SOURCE"


def test_the_number_of_threads_is_left_alone(tmp_path, train_here):
    before = torch.get_num_threads()
    assert train_here("--stages", "1", "--run-dir", tmp_path / "run") == 0
    assert torch.get_num_threads() == before


@pytest.fixture
def deterministic_here(monkeypatch):
    """Undoes what --deterministic does to a process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as the user's own
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_holds_for_the_whole_run(tmp_path, train_here, deterministic_here, monkeypatch):
    on = []
    append = "r2d2fast.train.metrics.Metrics.append"
    monkeypatch.setattr(append, lambda *_: on.append(torch.are_deterministic_algorithms_enabled()))
    assert train_here("--stages", "1", "--run-dir", tmp_path / "not") == 0
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert train_here("--deterministic", "--run-dir", tmp_path / "run") == 0
    assert on == [False] * 4 + [True] * 11
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's choice
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert train_here("--deterministic", "--stages", "1", "--run-dir", tmp_path / "other") == 0
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_compiled_network_trains_as_the_other_does(finished, tmp_path, train_here):
    """By the backend of --compile that needs no compiler of code, which is the slow part."""
    compiled = torch.compile
    with mock.patch.object(torch, "compile", lambda model, **_: compiled(model, backend="aot_eager", dynamic=False)):
        assert train_here("--run-dir", tmp_path / "run", "--compile") == 0
    errors = [json.loads((run / "results.json").read_text())["test_error"] for run in (finished, tmp_path / "run")]
    assert abs(errors[0] - errors[1]) < 3
