"""A network that starts from pretrained weights sees images normalised as those that the weights were made with."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from r2d2fast import dataset_from_arrays, load_run
from r2d2fast.data import Preprocessing, consecutive_batches
from r2d2fast.models import DEFAULT, own_images
from r2d2fast.train import cli
from r2d2fast.train.load_data import images_of_weights, placed
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES
from tests.data.small_photographs import write_class_folders

CONFIG = replace(RECIPES["cifar10"].config, backbone="resnet18", pretrained=DEFAULT)
SHORT = [
    *("--num-labels=10", "--stage1.epochs=1", "--stage1.cosine-epochs=1", "--stage1.batch=8", "--stage1.lr=0.001"),
    *("--stage2.epochs=1", "--stage2.repredict-epochs=", "--stage2.lrs=0.001"),
    *("--stage2.unlabelled-batch=8", "--stage2.labelled-batch=4", "--stage3.epochs=1", "--stage3.batch=16"),
]
X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def first_batch(config, x=X):
    data = placed(dataset_from_arrays(x, np.arange(12) % 3), config, Ranks())
    return next(data.train.batches(consecutive_batches(torch.arange(12), 12), None, 0))


def own_file(path: Path, preprocessing: Preprocessing) -> Path:
    save_file({"weight": torch.zeros(1)}, path, {"preprocessing": preprocessing.to_json()})
    return path


def test_small_images_are_normalised_as_the_library_s_weights_want():
    own = own_images("resnet18")
    expected = (X / 255 - own.mean) / own.std
    np.testing.assert_allclose(first_batch(CONFIG).permute(0, 2, 3, 1), expected, atol=1e-5)
    other = first_batch(replace(CONFIG, pretrained=None))
    assert other.mean().abs() < 1e-5 < 0.1 < first_batch(CONFIG).mean().abs()
    # A file of the same backbone that says nothing of itself is the library's, fetched by hand.
    assert torch.equal(first_batch(replace(CONFIG, pretrained=Path("resnet18.pth"))), first_batch(CONFIG))


@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, backbone="small", pretrained=Path("own.pt")), replace(CONFIG, backbone="torchvision:zork")],
)
def test_weights_of_which_nobody_knows_leave_images_as_they_are(config):
    assert torch.equal(first_batch(config), first_batch(replace(CONFIG, pretrained=None)))


def test_grey_images_are_not_normalised_by_three_channels():
    grey = X[..., :1]
    assert torch.equal(first_batch(CONFIG, grey), first_batch(replace(CONFIG, pretrained=None), grey))


def test_a_network_of_ours_says_what_it_has_seen(tmp_path):
    small = Preprocessing("small images", (3, 8, 8), (10.0, 20.0, 30.0), (4.0, 5.0, 6.0))
    file = own_file(tmp_path / "network.safetensors", small)
    expected = (X - np.array(small.mean)) / small.std
    ours = first_batch(replace(CONFIG, pretrained=file))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)
    # Photographs: bit for bit, and from units of pixel values.
    other = Preprocessing("photographs", (3, 64, 64), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 255, 72, "bicubic")
    assert images_of_weights(replace(CONFIG, pretrained=own_file(file, other)), 3) == other
    embeddings = own_file(file, Preprocessing("embeddings", (9,)))
    assert images_of_weights(replace(CONFIG, pretrained=embeddings), 3) is None


def test_a_run_from_the_library_s_weights_and_one_from_its_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = torchvision.models.get_model_weights("resnet18")["DEFAULT"].url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "hub" / "checkpoints" / file)
    write_class_folders(tmp_path / "images", 40, 32, 32)
    flags = ["--dataset=folder", f"--data-dir={tmp_path / 'images'}", "--backbone=resnet18", *SHORT]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main([*flags, "--pretrained=default", "--stages=1", f"--run-dir={first}"]) == 0
    said = (
        "images are normalised as those that the weights were made with, and stay 32 x 32 pixels large, where those had"
    )
    assert f"--pretrained default: {said} 224 x 224" in capsys.readouterr().out
    own = own_images("resnet18")
    run = load_run(first)
    assert run.preprocessing.shape == (3, 32, 32)
    assert run.preprocessing.mean == pytest.approx([255 * one for one in own.mean])
    # Stages 2 and 3 go on with it as it was trained.
    network = f"--pretrained={first / 'network.safetensors'}"
    assert cli.main([*flags, network, "--stages=2,3", f"--run-dir={second}"]) == 0
    assert "images are normalised as" not in capsys.readouterr().out
    assert load_run(second).preprocessing == run.preprocessing
    results = json.loads((second / "results.json").read_text())
    assert cli.main([*flags, network, "--stages=2,3", f"--run-dir={second}", "--eval-only"]) == 0
    assert f"{results['test_error']:.2f} %" in capsys.readouterr().out
