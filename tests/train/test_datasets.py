"""Each data set's one command, through all stages of its recipe on little files in their true formats."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from r2d2fast import load_run
from r2d2fast.data.photographs.packing import pack
from r2d2fast.report.cli import main as report
from r2d2fast.train import cli
from tests.data import stand_ins
from tests.data.small_photographs import write_tree

# Everything but the lengths is the recipe's own (and CIFAR-100's network, below).
SHORT = [
    *("--stage1.epochs=1", "--stage1.cosine-epochs=1", "--stage1.batch=4"),
    *("--stage2.epochs=2", "--stage2.repredict-epochs=1", "--stage2.lrs=0.01,0.01"),
    *("--stage2.unlabelled-batch=3", "--stage2.labelled-batch=1", "--stage3.epochs=1", "--stage3.batch=16"),
]


def prepare(dataset: str, root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Write the files of ``dataset`` into ``root``; the flags that fit so few images."""
    if dataset == "cifar10":
        stand_ins.cifar10(root, patch, per_file=4)
        return ["--num-labels=10"]
    if dataset == "cifar100":
        stand_ins.cifar100(root, patch)
        # SVHN has the same network, ConvLarge, and a hundred classes need a hundred images.
        batches = ["--stage1.batch=50", "--stage2.unlabelled-batch=30", "--stage3.batch=100"]
        return ["--num-labels=100", "--backbone=small", *batches]
    if dataset == "svhn":
        stand_ins.svhn(root, patch)
        return ["--num-labels=20", "--stage2.unlabelled-batch=12", "--stage3.batch=30"]
    if dataset == "mnist":
        stand_ins.mnist(root / "MNIST" / "raw", packed=False)
        return ["--num-labels=10", "--stage2.lrs=0.05", "--stage2.repredict-epochs="]
    if dataset == "fashion-mnist":
        stand_ins.mnist(root / "FashionMNIST" / "raw", packed=True)
        return ["--num-labels=10"]
    if dataset == "embeddings":
        return embeddings(root)
    write_tree(root, 16, 4)
    if dataset == "imagenet":
        return ["--num-labels=4", "--image-size=64", "--resize=72", "--workers=2"]
    # Images of one's own, a few of which a file gives a class.
    images = sorted((root / "train").glob("*/*"))
    (root / "images").mkdir()
    lines = []
    for number, image in enumerate(images):
        image.rename(root / "images" / f"{number}.jpg")
        if number % 2:
            lines.append(f"{number}.jpg {image.parent.name}")
    (root / "images" / "labels.txt").write_text("\n".join(lines))
    return [f"--data-dir={root / 'images'}", "--image-size=64", "--resize=72"]


def embeddings(root: Path) -> list[str]:
    root.mkdir()
    labels = np.arange(48) % 4
    rows = np.eye(4, 9)[labels] + 0.1 * np.random.default_rng(0).normal(size=(48, 9))
    np.save(root / "train.npy", rows[:32].astype(np.float16))
    np.save(root / "train_labels.npy", labels[:32])
    np.save(root / "test.npy", rows[32:])
    np.save(root / "test_labels.npy", labels[32:])
    return ["--num-labels=8"]


# Of each kind of file and each way to a network one is fast.
SLOW = ("cifar10", "cifar100", "fashion-mnist", "svhn", "folder")


@pytest.mark.parametrize(
    "dataset", ["mnist", "imagenet", "embeddings", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_one_command_goes_through_all_stages(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = prepare(dataset, tmp_path / "data", monkeypatch)
    run = tmp_path / "run"
    command = [f"--dataset={dataset}", f"--data-dir={tmp_path / 'data'}", f"--run-dir={run}", *SHORT, *flags]
    assert cli.main(command) == 0
    results = json.loads((run / "results.json").read_text())
    stages = [1, 2] if dataset in ("mnist", "embeddings") else [1, 2, 3]
    assert [entry["stage"] for entry in results["stages"]] == stages
    assert 0 <= results["test_error"] <= 100
    assert (run / "network.safetensors").stat().st_size > (500 if dataset == "embeddings" else 10_000)


@pytest.mark.parametrize("backbone", ["linear", "mlp"])
def test_embeddings_without_test_data(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    embeddings(data)
    (data / "test.npy").unlink()
    (data / "test_labels.npy").unlink()
    # Of the labels that are given, not of a split of them: of the others nobody knows the class.
    np.save(data / "train_labels.npy", np.where(np.arange(32) < 8, np.arange(32) % 4, -1))
    flags = ["--dataset=embeddings", f"--data-dir={data}", f"--backbone={backbone}", "--stages=1,2,3", *SHORT]
    assert cli.main([*flags, "--dry-run"]) == 0
    assert cli.main([*flags, "--runs=2", f"--run-dir={run}"]) == 0
    assert "stage 3: no test error, as there are no test samples after 1 epoch;" in capsys.readouterr().out
    results = json.loads((run / "run0" / "results.json").read_text())
    assert results["test_error"] is None
    assert [entry["test_error"] for entry in results["stages"]] == [None] * 3
    assert (run / "run0" / "curves.png").exists()
    assert cli.main([*flags, f"--run-dir={run / 'run0'}", "--eval-only"]) == 0
    assert "no test error, as there are no test samples: the network in" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert report([str(run), f"--output={page}"]) == 0
    assert "embeddings are no images" in page.read_text()


def test_embeddings_of_which_one_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeddings(tmp_path / "data")
    rows = np.load(tmp_path / "data" / "train.npy")
    rows[7, 3] = np.nan
    np.save(tmp_path / "data" / "train.npy", rows)
    assert cli.main(["--dataset=embeddings", f"--data-dir={tmp_path / 'data'}", f"--run-dir={tmp_path / 'run'}"]) == 2
    assert "train has NaN in row 7, column 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--flip", "--flip True: must be off for embeddings, whose augmentation is --dropout"),
        ("--dropout=1", "--dropout 1.0: must be at least 0 and below 1"),
        ("--feature-length=0", "--feature-length 0.0: must be above 0"),
        ("--hidden-layer-sizes=3,0", "--hidden-layer-sizes 3,0: must be 1 or more each"),
        ("--backbone=small", "backbone 'small' takes images, and these are embeddings; accepted: linear, mlp"),
    ],
)
def test_settings_that_do_not_fit_embeddings(
    flag: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    flags = ["--dataset=embeddings", f"--data-dir={data}", f"--run-dir={tmp_path / 'run'}", *SHORT, "--num-labels=8"]
    embeddings(data)
    assert cli.main([*flags, flag]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder tree of JPEG files, cut out of two photographs."""
    root = tmp_path_factory.mktemp("photographs")
    write_tree(root, 24, 6)
    return root


PHOTOGRAPHS = [
    *("--dataset=imagenet", "--image-size=64", "--resize=72", "--num-labels=4", "--workers=0", *SHORT),
    "--stage2.epochs=3",
]


@pytest.mark.slow
def test_photographs_packed_trained_killed_resumed_evaluated_exported(photographs: Path, tmp_path: Path) -> None:
    packed, run, whole = (tmp_path / name for name in ("packed", "run", "whole"))
    pack(photographs, packed, short_side=72)
    flags = [*PHOTOGRAPHS, f"--data-dir={packed}"]
    assert cli.main([*flags, f"--run-dir={whole}"]) == 0

    command = [sys.executable, "-m", "r2d2fast.train", *flags, f"--run-dir={run}", "--checkpoint-minutes=0.0001"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (run / "checkpoint.previous").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (run / "results.json").exists()
    assert cli.main([*flags, f"--run-dir={run}", "--resume"]) == 0
    resumed, uninterrupted = (load_file(directory / "network.safetensors") for directory in (run, whole))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())

    assert cli.main([*flags, f"--run-dir={run}", "--eval-only"]) == 0
    # What was exported is what another run can start from.
    exported = f"--pretrained={run / 'network.safetensors'}"
    assert cli.main([*flags, f"--run-dir={tmp_path / 'next'}", exported, "--stages=1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_stop_the_run_or_are_counted(
    workers: int, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(photographs, tmp_path / "data")
    damaged = sorted(data.glob("train/*/*"))[:2]
    for image in damaged:
        image.write_bytes(image.read_bytes()[:200])
    flags = [*PHOTOGRAPHS, f"--data-dir={data}", f"--workers={workers}"]
    assert cli.main([*flags, f"--run-dir={tmp_path / 'stopped'}"]) != 0
    message = capsys.readouterr().err
    assert any(image.name in message for image in damaged), message
    assert "--on-bad-image skip" in message
    run = tmp_path / "run"
    assert cli.main([*flags, f"--run-dir={run}", "--on-bad-image=skip"]) == 0
    assert json.loads((run / "results.json").read_text())["bad_images"] == 2
    told = capsys.readouterr().out.partition("2 images could not be read")[2]
    assert all(image.name in told for image in damaged)


DALI = [("--device=cpu",), ("--device=cpu", "--workers=1")]
DALI_ON_GPUS = [("--device=cuda",), ("--device=cuda", "--workers=1", "--compile")]


@pytest.mark.slow
@pytest.mark.extra("nvidia.dali")
@pytest.mark.parametrize("how", [*DALI, *(pytest.param(flags, marks=pytest.mark.gpu) for flags in DALI_ON_GPUS)])
def test_dali_decodes_in_all_stages(how: tuple[str, ...], photographs: Path, tmp_path: Path) -> None:
    if "--device=cuda" in how and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here (torch.cuda.is_available() is False)")
    flags = [*PHOTOGRAPHS, f"--data-dir={photographs}", f"--run-dir={tmp_path}", *how]
    assert cli.main([*flags, "--decoder=dali"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["stages"]) == 3
    # Where DALI fails, a run goes on without it.
    assert cli.main([*flags, "--decoder=cpu", "--resume"]) == 0


def test_where_dali_is_missing_the_command_line_says_what_to_install(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*PHOTOGRAPHS, f"--data-dir={photographs}", f"--run-dir={tmp_path / 'run'}", "--decoder=dali"]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert cli.main(flags) == 2
    message = capsys.readouterr().err
    assert '--decoder dali: nvidia.dali is not installed; pip install "r2d2fast[dali]", or --decoder cpu' in message
    assert not (tmp_path / "run").exists()


@pytest.mark.extra("timm")
def test_a_pretrained_network_sees_images_as_it_wants_them_and_predicts_so(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    weights = ["--backbone=timm:test_vit", f"--pretrained={tmp_path / 'vit.pth'}"]
    flags = ["--dataset=folder", f"--data-dir={photographs}", "--num-labels=4", *SHORT, *weights]
    assert cli.main([*flags, "--dry-run"]) == 0
    assert re.search(r"--image-size\W+160\W+the network's weights", capsys.readouterr().out)
    run = tmp_path / "run"
    assert cli.main([*flags, "--stages=1", f"--run-dir={run}"]) == 0
    trained = load_run(run)
    own = trained.preprocessing
    assert (own.shape, own.interpolation, own.mean) == ((3, 160, 160), "bicubic", (0.5, 0.5, 0.5))
    classes = [trained.class_names.index(path.parent.name) for path in sorted(photographs.glob("val/*/*"))]
    error = 100 * np.mean(trained.predict(photographs / "val").classes != classes)
    assert json.loads((run / "results.json").read_text())["test_error"] == pytest.approx(error)
