"""Data, splits and weights that are not there or not right."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2d2fast.train import cli
from tests.data.small_photographs import write_tree

# --- data that is not there or not right


@pytest.mark.parametrize(
    ("dataset", "files", "flags"),
    [
        ("mnist", "train-images-idx3-ubyte", []),
        ("fashion-mnist", "train-images-idx3-ubyte", []),
        ("svhn", "train_32x32.mat", []),
        ("cifar10", "data_batch_1", ["--dry-run"]),
        ("cifar100", "cifar-100-python/train", []),
        ("imagenet", "train", []),
        ("folder", "train", ["--dry-run"]),
    ],
)
def test_a_missing_data_set_says_what_to_put_where(dataset, files, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("r2d2fast.data.small_images.FASHION_MNIST_PACKAGE", tmp_path / "no package")
    arguments = ["--dataset", dataset, "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    assert cli.main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    for part in (str(tmp_path / "data"), files, "" if dataset in ("imagenet", "folder") else "--download"):
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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--translate=4", "--translate 4: must be 0 for photographs"),
        ("--cutout=4", "--cutout 4: must be 0 for photographs"),
        ("--image-size=33", "--image-size 33: must be 1 to --resize 32"),
        ("--workers=-1", "--workers -1: must be at least 0"),
    ],
)
def test_what_photographs_cannot_have_is_refused_by_its_flag(flag, message, tmp_path, capsys):
    flags = ["--dataset=folder", f"--data-dir={write_tree(tmp_path / 'photographs', 4, 2, 40, 36)}", "--resize=32"]
    assert cli.main([*flags, "--image-size=32", flag, "--run-dir", str(tmp_path / "run")]) == 2
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
    assert (directory / "network.safetensors").read_bytes() == (finished / "network.safetensors").read_bytes()


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
