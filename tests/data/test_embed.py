"""Embeddings of images: their rows by definition, labels and names, stopping and going on, and what is not as it should be."""

import fcntl
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from r2d2fast.data import embed as module
from r2d2fast.data.embed import Arguments, embed, main
from r2d2fast.data.errors import DataError
from r2d2fast.data.photographs.packing import pack
from r2d2fast.models import load_pretrained, make_feature_extractor
from tests.data.small_photographs import write_class_folders, write_tree

NAME = "squeezenet1_1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones, in a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(torchvision.models.get_model(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def arguments(root, weights, tmp_path):
    return Arguments(
        root,
        tmp_path / "out",
        f"torchvision:{NAME}",
        weights,
        image_size=40,
        batch=5,
        precision="float32",
        device="cpu",
    )


def command(arguments, *flags):
    return [
        *(
            str(arguments.source),
            str(arguments.dest),
            f"--backbone={arguments.backbone}",
            "--image-size=40",
            "--batch=5",
        ),
        *(f"--pretrained={arguments.pretrained}", "--device=cpu", "--precision=float32", *flags),
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def definition(paths, weights):
    """By torchvision, one image after the other: float32 [M, 512]."""
    network = torchvision.models.get_model(NAME)
    load_pretrained(network, weights)
    network.classifier[1] = torch.nn.Identity()
    network.eval()
    # Of the network's own 224 of 256 pixels, 40 of round(256 * 40 / 224).
    show = v2.Compose(
        [
            *(v2.Resize(46, antialias=True), v2.CenterCrop(40), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        return torch.cat([network(show(pil_to_tensor(Image.open(path)))[None]) for path in paths]).numpy()


def test_rows_are_the_features_of_the_images_and_labels_names_and_classes_are_kept(arguments, root, weights):
    about = embed(arguments)
    for part, count, source in (("train", 12, "train"), ("test", 6, "val")):
        rows = np.load(arguments.dest / f"{part}.npy")
        assert (rows.dtype, rows.shape) == (np.float16, (count, 512))
        paths = sorted((root / source).glob("*/*"))
        np.testing.assert_allclose(rows, definition(paths, weights), rtol=2e-3, atol=2e-3)
        assert rows.std() > 0.01
        labels = np.load(arguments.dest / f"{part}_labels.npy")
        assert (labels.dtype, labels.tolist()) == (np.int64, [0] * (count // 2) + [1] * (count // 2))
        names = (arguments.dest / f"{part}_names.txt").read_text().splitlines()
        assert names == [str(path.relative_to(root / source)) for path in paths]
    assert (arguments.dest / "classes.txt").read_text() == "china\nflower\n"
    assert json.loads((arguments.dest / "embed.json").read_text()) == about
    assert (about["image_size"], about["resize"], about["images"]) == (40, 46, {"train": 12, "test": 6})
    assert len(list(arguments.dest.iterdir())) == 8
    assert list(arguments.dest.parent.iterdir()) == [arguments.dest]


def test_the_command_with_float32_and_loader_processes(arguments, capsys):
    assert main(command(arguments, "--dtype=float32", "--workers=2")) == 0
    printed = capsys.readouterr().out
    assert "train: 12 images x 512 numbers, float32, 0 skipped\n" in printed
    assert f"python -m r2d2fast.train --dataset embeddings --data-dir {arguments.dest}" in printed
    half = replace(arguments, dest=arguments.dest.with_name("half"))
    embed(half)
    rows = np.load(arguments.dest / "train.npy")
    assert rows.dtype == np.float32
    assert np.array_equal(rows.astype(np.float16), np.load(half.dest / "train.npy"))


def test_a_packed_source_gives_the_same_where_it_has_the_files_themselves(arguments, root, tmp_path):
    pack(root, tmp_path / "packed", short_side=None)
    embed(arguments)
    embed(replace(arguments, source=tmp_path / "packed", dest=tmp_path / "of-packed"))
    assert contents(arguments.dest)["train.npy"] == contents(tmp_path / "of-packed")["train.npy"]


def test_unlabelled_images_have_the_label_minus_1(arguments, tmp_path):
    write_class_folders(tmp_path / "images", 10)
    lines = "".join(f"{kind}/{number:03}.jpg {kind}\n" for number, kind in ((0, "china"), (1, "flower")))
    (tmp_path / "images/labels.txt").write_text(lines)
    about = embed(replace(arguments, source=tmp_path / "images", test_fraction=0))
    assert np.load(arguments.dest / "train_labels.npy").tolist() == [0, -1, -1, -1, -1, 1, -1, -1, -1, -1]
    assert about["images"] == {"train": 10}
    assert not list(arguments.dest.glob("test*"))


def test_what_is_held_out_is_told(arguments, tmp_path, capsys):
    write_class_folders(tmp_path / "images", 20)
    assert main(command(replace(arguments, source=tmp_path / "images"), "--test-fraction=0.5")) == 0
    assert "10 labelled images are the test part, since the source has none; --test-fraction" in capsys.readouterr().out
    assert np.load(arguments.dest / "test.npy").shape == (10, 512)


@pytest.mark.parametrize(("name", "filter"), [("resnet", "bilinear"), ("efficientnet", "bicubic"), ("vit", "bicubic")])
def test_timm_with_its_own_size_normalisation_and_filter(arguments, tmp_path, name, filter):
    timm = pytest.importorskip("timm")
    network = timm.create_model(f"test_{name}")
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    _, own = make_feature_extractor(f"timm:test_{name}", tmp_path / "timm.pth")
    wanted = timm.data.resolve_model_data_config(network)
    assert (own.image_size, own.mean, own.std) == (160, wanted["mean"], wanted["std"])
    assert own.interpolation == wanted["interpolation"] == filter
    embed(
        replace(
            arguments, backbone=f"timm:test_{name}", pretrained=tmp_path / "timm.pth", image_size=None, dtype="float32"
        )
    )
    rows = np.load(arguments.dest / "train.npy")
    assert rows.shape == (12, network.num_features)
    network.eval()
    show = timm.data.create_transform(**wanted, is_training=False)
    images = [show(Image.open(path)) for path in sorted((arguments.source / "train").glob("*/*"))]
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(torch.stack(images)), pre_logits=True).numpy()
    # timm resizes by Pillow, whose filter rounds between the two directions.
    assert np.abs(rows - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_is_taken_where_it_is_faster(arguments, monkeypatch, supported):
    times = iter([0, 2, 2, 3] if supported else [0, 1, 1, 3])
    clock = SimpleNamespace(perf_counter=lambda: next(times), monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", clock)
    assert embed(replace(arguments, precision="auto"))["precision"] == ("bfloat16" if supported else "float32")
    embed(replace(arguments, dest=arguments.dest.with_name("float32")))
    rows, exact = (np.load(path / "train.npy") for path in (arguments.dest, arguments.dest.with_name("float32")))
    assert np.array_equal(rows, exact) != supported
    np.testing.assert_allclose(rows, exact, rtol=0.1, atol=0.05)


# --- stopping and going on


class Stopped(Exception):
    pass


def stop_after(monkeypatch, batches):
    """The network raises after so many batches; those that it has seen."""
    seen = []
    forward = module._Features.__call__

    def counted(self, pixels):
        if len(seen) == batches:
            raise Stopped
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(module._Features, "__call__", counted)
    return seen


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(arguments, monkeypatch, batches, saves):
    """12 images to train on are 3 batches, 6 to test on are 2. Without a save in between, what was written after it goes."""
    whole = replace(arguments, dest=arguments.dest.with_name("whole"))
    embed(whole)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0 if saves else 1000)
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(Stopped):
            embed(arguments)
    assert not arguments.dest.exists()
    with monkeypatch.context() as patch:
        seen = stop_after(patch, None)
        embed(arguments)
    # The end of a part is always saved.
    assert len(seen) == 5 - (batches if saves else 3 * (batches >= 3))
    assert contents(arguments.dest) == contents(whole.dest)


def test_damaged_images_are_counted_when_it_goes_on(arguments, damaged, monkeypatch):
    arguments = replace(arguments, source=damaged, on_bad_image="skip")
    whole = replace(arguments, dest=arguments.dest.with_name("whole"))
    embed(whole)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            embed(arguments)
    embed(arguments)
    assert contents(arguments.dest) == contents(whole.dest)


def test_other_settings_do_not_go_on_where_a_run_was_stopped(arguments, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            embed(arguments)
    with pytest.raises(
        DataError, match=r"out\.partial was begun with another resize, image_size|image_size, resize; repeat"
    ):
        embed(replace(arguments, image_size=48))
    torch.manual_seed(1)
    torch.save(torchvision.models.get_model(NAME).state_dict(), arguments.dest.with_name("other.pth"))
    with pytest.raises(
        DataError, match=r"begun with another weights_crc32; repeat the command .* or remove that folder"
    ):
        embed(replace(arguments, pretrained=arguments.dest.with_name("other.pth")))
    embed(arguments)


def test_an_interruption_says_how_to_go_on(arguments, monkeypatch, capsys):
    def interrupted(self, pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Features, "__call__", interrupted)
    assert main(command(arguments)) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_two_processes_do_not_write_the_same_folder(arguments):
    with open(arguments.dest.with_name("out.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing to"):
            embed(arguments)


# --- what is not as it should be


@pytest.fixture
def damaged(tmp_path):
    root = write_tree(tmp_path / "damaged")
    (root / "train/china/002.jpg").write_bytes(b"")
    (root / "val/flower/001.jpg").write_bytes(b"no image")
    return root


def test_a_damaged_image_is_named_or_left_out_and_listed(arguments, damaged, capsys):
    arguments = replace(arguments, source=damaged)
    assert main(command(arguments)) == 1
    assert "china/002.jpg: not a readable image" in capsys.readouterr().err
    # With it the same command goes on.
    assert main(command(arguments, "--on-bad-image=skip")) == 0
    assert "1 skipped\n  china/002.jpg: not a readable image" in capsys.readouterr().out
    assert np.load(arguments.dest / "train.npy").shape == (11, 512)
    assert np.load(arguments.dest / "train_labels.npy").tolist() == [0] * 5 + [1] * 6
    assert "china/002.jpg" not in (arguments.dest / "train_names.txt").read_text()


def test_a_part_without_a_single_good_image(arguments, tmp_path):
    root = write_tree(tmp_path / "bad", 4, 2)
    for path in (root / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 images of part 'test' can be decoded"):
        embed(replace(arguments, source=root, on_bad_image="skip"))


def test_an_image_that_cannot_be_read(arguments, tmp_path):
    root = write_tree(tmp_path / "gone", 4, 2)
    (root / "train/china/gone.jpg").symlink_to("gone.jpg")
    with pytest.raises(DataError, match=r"cannot read an image of part 'train': .*Too many levels.*gone\.jpg"):
        embed(replace(arguments, source=root, on_bad_image="skip"))


def test_an_embedding_that_float16_cannot_hold_is_named_with_a_way_out(arguments, tmp_path):
    weights = torch.load(arguments.pretrained)
    weights["features.0.weight"] *= 1e9
    torch.save(weights, tmp_path / "large.pth")
    large = replace(arguments, pretrained=tmp_path / "large.pth")
    with pytest.raises(DataError, match=r"embedding of china/000\.jpg is not finite in float16; take --dtype float32"):
        embed(large)
    embed(replace(large, dest=tmp_path / "float32", dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "resnet18"},
            r"'resnet18' is no network of torchvision or timm; accepted: torchvision:NAME, timm:NAME",
        ),
        ({"backbone": "torchvision:resnet19"}, r"torchvision has no network 'resnet19'; the nearest is 'resnet1"),
        ({"pretrained": Path("missing.pth")}, r"missing\.pth cannot be read: No such file"),
        ({"backbone": "torchvision:resnet18"}, r"do not fit this network"),
        ({"batch": 0}, r"--batch is 0; accepted: 1 or more"),
        ({"image_size": -1}, r"--image-size is -1; accepted: 1 or more"),
        ({"device": "abacus"}, r"--device abacus: no such device; accepted here: auto, cpu"),
        ({"source": Path("nowhere")}, r"nowhere: no such folder"),
    ],
)
def test_arguments_that_will_not_do(arguments, changes, message):
    with pytest.raises(DataError, match=message):
        embed(replace(arguments, **changes))
    assert not arguments.dest.exists()


def test_weights_that_cannot_be_downloaded(arguments, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    address = r"cannot be downloaded \(no route to host\): fetch https://\S*/\w+-\w+\.pth elsewhere, and put it into"
    with pytest.raises(
        DataError, match=rf"{address} \S*/checkpoints/\w+-\w+\.pth, or name the file, --pretrained FILE"
    ):
        embed(replace(arguments, pretrained=None))


def test_nothing_is_written_over(arguments):
    arguments.dest.mkdir()
    with pytest.raises(DataError, match=r"out exists; remove it, or name another destination"):
        embed(arguments)


def test_a_name_with_a_line_break_is_refused(arguments, tmp_path):
    root = write_tree(tmp_path / "names", 4, 2)
    (root / "train/china/000.jpg").rename(root / "train/china/a\nb.jpg")
    with pytest.raises(DataError, match=r"'china/a\\nb\.jpg' has a line break in it"):
        embed(replace(arguments, source=root))
