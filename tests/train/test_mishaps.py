"""What a run meets: data and weights that are not right, directories that are not its own, full disks, ctrl-C."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_run import assert_same_network, assert_same_run

from r2d2fast.train import cli
from tests.data.small_photographs import write_tree
from tests.limits import file_size_limit

# --- data that is not there or not right


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("dataset", "files", "remedy"),
    [
        ("mnist", "train-images-idx3-ubyte", "--download"),
        ("fashion-mnist", "train-images-idx3-ubyte", "--download"),
        ("svhn", "train_32x32.mat", "--download"),
        ("cifar10", "data_batch_1", "--download"),
        ("cifar100", "cifar-100-python/train", "--download"),
        ("imagenet", "train", ""),
        ("folder", "train", ""),
    ],
)
def test_a_missing_data_set_says_what_to_put_where(dataset, files, remedy, dry_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("r2d2fast.data.small_images.FASHION_MNIST_PACKAGE", tmp_path / "no package")
    arguments = ["--dataset", dataset, "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    assert cli.main([*arguments, *dry_run]) == 2
    error = capsys.readouterr().err
    for part in (str(tmp_path / "data"), files, remedy):
        assert part in error
    assert not (tmp_path / "run").exists()


def test_a_split_file_names_the_line_that_is_wrong(tmp_path, train_here, capsys):
    path = tmp_path / "split.txt"
    for text, message in (
        ("12 3\n99999 1\n", "line 2: the data set has no training sample '99999'"),
        ("12 ten\n", "line 1: 'ten' is no class"),
        ("", "labels no sample"),
    ):
        path.write_text(text)
        assert train_here("--split-file", path, "--run-dir", tmp_path / "run") == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["split.txt"]


@pytest.fixture
def folder(tmp_path):
    """Photographs, and flags to train on them for an epoch."""
    root = write_tree(tmp_path / "photographs", train=16, val=4, width=40, height=36)
    flags = (
        *("--dataset=folder", f"--data-dir={root}", "--image-size=32", "--resize=32", "--backbone=small"),
        *("--stages=1", "--stage1.epochs=1", "--stage1.batch=8", "--stage1.cosine-epochs=1"),
    )
    return root, flags


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_or_counted(folder, workers, tmp_path, capsys):
    root, flags = folder
    bad = next((root / "train").glob("*/*.jpg"))
    bad.write_bytes(bad.read_bytes()[:200])
    flags = (*flags, f"--workers={workers}")
    assert cli.main([*flags, "--run-dir", str(tmp_path / "run")]) == 1
    assert bad.name in capsys.readouterr().err
    directory = tmp_path / "other run"
    assert cli.main([*flags, "--on-bad-image=skip", "--run-dir", str(directory)]) == 0
    assert json.loads((directory / "results.json").read_text())["bad_images"] == 1
    assert "1 images could not be decoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--translate=4", "--translate 4: must be 0 for photographs"),
        ("--cutout=4", "--cutout 4: must be 0 for photographs"),
        ("--image-size=33", "--image-size 33: must be 1 to --resize 32"),
        ("--workers=-1", "--workers -1: must be at least 0"),
    ],
)
def test_what_photographs_cannot_have_is_refused_by_its_flag(flag, message, folder, tmp_path, capsys):
    assert cli.main([*folder[1], flag, "--run-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- weights and splits of one run for another


def test_the_split_file_of_one_run_gives_another_the_same_labels(tmp_path, train_here, finished, capsys):
    directory = tmp_path / "run"
    split = finished / "labelled.txt"
    # Another seed of the split and another number of labels: the file counts.
    flags = ("--split-file", split, "--split", 5, "--num-labels", 10)
    assert train_here("--run-dir", directory, *flags) == 0
    assert (directory / "labelled.txt").read_bytes() == split.read_bytes()
    assert_same_network(directory, finished)


def test_a_run_starts_from_the_network_of_another(tmp_path, train_here, finished, capsys):
    network = finished / "network.safetensors"
    # A learning rate of 0: the weights stay, and only batch norm's statistics are the new run's.
    flags = ("--pretrained", network, "--stages", "1", "--stage1.lr", 0, "--seed", 1)
    assert train_here("--run-dir", tmp_path / "run", *flags) == 0
    weights, expected = load_file(tmp_path / "run" / "network.safetensors"), load_file(network)
    assert weights.keys() == expected.keys()
    kept = [name for name in expected if "running" not in name and "tracked" not in name]
    assert len(kept) >= 4
    assert all(torch.equal(weights[name], expected[name]) for name in kept)


def test_weights_that_do_not_fit_are_refused(tmp_path, train_here, capsys):
    for name, content, message in (
        ("other.safetensors", None, "do not fit this network: missing: "),
        ("damaged.safetensors", b"damaged", "is damaged or of another format"),
        ("damaged.pt", b"damaged", "is damaged"),
    ):
        path = tmp_path / name
        if content is None:
            save_file({"weight": torch.zeros(1)}, path)
        else:
            path.write_bytes(content)
        assert train_here("--pretrained", path, "--run-dir", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert message in error
    assert not (tmp_path / "run").exists()


# --- the run directory


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

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert train_here("--stages", "1", "--run-dir", tmp_path / "run") == 0


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


# --- disks, divergence, ctrl-C


# config.json has a kilobyte, a checkpoint 200.
@pytest.mark.parametrize(("limit", "named"), [(500, "config.json"), (50_000, "checkpoint.tmp")])
def test_a_full_disk_costs_nothing_but_the_wait(tmp_path, train_here, finished, capsys, limit, named):
    directory = tmp_path / "run"
    with file_size_limit(limit):
        assert train_here("--run-dir", directory) == 1
    error = capsys.readouterr().err
    assert f"cannot write {directory / named}: " in error
    assert "--resume" in error
    assert train_here("--run-dir", directory, "--resume") == 0
    assert_same_run(directory, finished)


def test_a_disk_that_is_full_at_the_end_costs_no_training(tmp_path, train_here, finished, capsys, monkeypatch):
    directory = shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "network.safetensors", "labelled.txt"):
        (directory / name).unlink()
    for limit, named in ((100, "labelled.txt"), (10_000, "curves.png"), (80_000, "network.safetensors")):
        with file_size_limit(limit):
            assert train_here("--run-dir", directory, "--resume") == 1
        error = capsys.readouterr().err
        assert f"cannot write {directory / named}: File too large" in error
        assert not (directory / "results.json").exists()
    monkeypatch.setattr("r2d2fast.train.trainer.Trainer.run_epoch", lambda *_: pytest.fail("trained"))
    assert train_here("--run-dir", directory, "--resume") == 0
    assert_same_run(directory, finished)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where_and_what_is_kept(tmp_path, train_here, capsys):
    directory = tmp_path / "run"
    assert train_here("--run-dir", directory, "--stage2.lrs", "1e30,1e30,1e30") == 1
    error = capsys.readouterr().err
    assert "the loss is nan in stage 2, epoch 0, step" in error
    assert f"The last good checkpoint, after 4 epochs, is {directory / 'checkpoint'}." in error
    assert not (directory / "results.json").exists()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_ends_with_how_to_go_on(tmp_path, train_here, monkeypatch, finished, capsys):
    # In the background of a shell SIGINT is ignored; this process may run there, and should receive it all the same.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = tmp_path / "run"
    try:
        with monkeypatch.context() as patch:
            patch.setattr("r2d2fast.train.metrics.Metrics.append", lambda *_: signal.raise_signal(signal.SIGINT))
            assert train_here("--run-dir", directory) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
    assert train_here("--resume", "--run-dir", directory) == 0
    assert_same_run(directory, finished)
