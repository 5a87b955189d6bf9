"""Training from Python, with data that the program has."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r2d2fast import dataset_from_arrays, dataset_from_torch, recipe_for, train_run
from r2d2fast.data import split_labels
from r2d2fast.train import cli
from r2d2fast.train.errors import ConfigError
from tests.train.small_data import pixels


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


Y = torch.arange(160) % 4
X = pixels(Y)


def short(recipe, **changes):
    config = recipe.config
    return replace(
        config,
        device="cpu",
        **changes,
        stage1=replace(config.stage1, epochs=3, batch=4, cosine_epochs=3),
        stage2=replace(
            config.stage2, epochs=2, unlabelled_batch=24, labelled_batch=8, repredict_epochs=(), lrs=(0.02,)
        ),
        stage3=replace(config.stage3, epochs=1),
    )


def test_images_in_arrays_with_a_run_directory_and_without(tmp_path):
    data = dataset_from_arrays(X[:120], Y[:120], X[120:], Y[120:], class_names=["a", "b", "c", "d"])
    config = short(recipe_for(data, num_labels=8), run_dir=tmp_path / "run")
    kept, other = train_run(config, data, verbose=False), train_run(replace(config, run_dir=None), data, verbose=False)
    assert sorted(kept.results) == sorted(json.loads((tmp_path / "run" / "results.json").read_text()))
    np.testing.assert_array_equal(kept.classes, other.classes)
    given = split_labels(Y[:120], 4, 8, 0)
    np.testing.assert_array_equal(kept.given, given >= 0)
    np.testing.assert_array_equal(kept.classes[kept.given], given[given >= 0])
    assert (kept.probabilities[kept.given] == 1).all()
    predicted = kept.network.predict(X[120:])
    assert kept.results["test_error"] == pytest.approx(100 * np.mean(predicted.classes != Y[120:].numpy()))
    assert predicted.names[0] in "abcd"
    with pytest.raises(ConfigError, match="already holds a run"):
        train_run(config, data, verbose=False)
    assert train_run(replace(config, resume=True), data, verbose=False).results == kept.results


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_callers_random_numbers_and_settings_stay_as_they_were(deterministic):
    data = dataset_from_arrays(X[:120], Y[:120])
    config = replace(short(recipe_for(data, num_labels=8)), stages=(1,), deterministic=deterministic)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_run(config, data, verbose=False)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


PROGRAM = """
import numpy as np
from dataclasses import replace
from r2d2fast import dataset_from_arrays, recipe_for, train_run

x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32") + np.eye(4, dtype="float32")[np.arange(64) % 4]
data = dataset_from_arrays(x, np.where(np.arange(64) < 16, np.arange(64) % 4, -1))
config = recipe_for(data).config
config = replace(config, device="cpu", stages=(1,), stage1=replace(config.stage1, epochs=2, batch=16, cosine_epochs=2))
done = train_run(config, data, verbose=False)
print("labelled", len(done.classes), done.network.predict(x).classes.shape)
"""


@pytest.mark.slow
def test_under_torchrun_without_a_run_directory(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("labelled 64 (64,)") == 2


def test_vectors_have_the_recipe_of_embeddings():
    x = 0.5 * np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32) + 3 * np.eye(4, 6)[np.arange(200) % 4]
    data = dataset_from_arrays(x, np.arange(200) % 4)
    config = recipe_for(data, num_labels=16).config
    assert (config.backbone, config.stage1.epochs, config.stage2.unlabelled_batch) == ("linear", 300, 64)
    done = train_run(replace(config, device="cpu"), data, verbose=False)
    assert np.mean(done.classes == np.arange(200) % 4) > 0.8
    assert done.results["test_error"] is None


def test_photographs_of_a_torch_data_set():
    rng = np.random.default_rng(0)
    items = [(Image.fromarray(rng.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8)), n % 2) for n in range(32)]
    data = dataset_from_torch(items, items[:4])
    config = short(recipe_for(data, num_labels=4, backbone="small"), image_size=32, resize=36, stages=(1,))
    done = train_run(config, data, verbose=False)
    assert done.classes.shape == (32,)
    assert 0 <= done.results["test_error"] <= 100


def test_the_command_line_trains_on_a_data_set_of_torchvision(tmp_path, capsys):
    for name in "ab":
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (16, 16), (10 * number, 200 * (name == "a"), 0)).save(folder / f"{number}.png")
    flags = ["--dataset=torchvision:EuroSAT", f"--data-dir={tmp_path}", "--num-labels=4", "--stages=1", "--device=cpu"]
    short = ["--stage1.epochs=2", "--stage1.batch=4", f"--run-dir={tmp_path / 'run'}"]
    assert cli.main([*flags, *short]) == 0
    assert "8 labelled ones held out to test on" in capsys.readouterr().out
    assert cli.main([f"--run-dir={tmp_path / 'run'}", *flags[:2], "--eval-only"]) == 0
    assert cli.main([*flags, "--dry-run"]) == 0
    assert cli.main([flags[0], f"--data-dir={tmp_path / 'nowhere'}"]) == 2
    assert "--dataset torchvision:EuroSAT: Dataset not found." in capsys.readouterr().err
