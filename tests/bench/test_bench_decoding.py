"""The decoders do the same work, and the command says what it measured."""

import pytest
import torch
from PIL import Image

import bench.decoding as command
from bench.decoders import DECODERS, SIZE
from bench.decoding import OURS
from bench.photographs import SIZES, write_photographs

# What r2d2fast needs anyway.
ALWAYS = ("r2d2fast", "pillow", "draft", "simplejpeg")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, train=20, val=2)
    return root


def test_photographs_have_imagenet_s_sizes_and_bytes(photographs):
    paths = sorted(photographs.glob("train/*/*"))
    assert sorted(Image.open(path).size for path in paths) == sorted(SIZES * 2)
    pixels = sum(width * height for width, height in SIZES * 2)
    assert sum(path.stat().st_size for path in paths) / pixels == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("name", ALWAYS)
def test_a_batch_is_crops_of_all_photographs(photographs, name):
    made = DECODERS[name].prepare(photographs)()
    batch = made[0] if name == OURS else made
    assert (batch.dtype, batch.shape) == (torch.uint8, (20, 3, SIZE, SIZE))
    # Crops of the same pictures: half the first photograph, mostly sky, and half flowers.
    means = batch.float().mean((1, 2, 3))
    assert means[:10].mean() > means[10:].mean() + 20


def test_a_decoder_that_is_not_installed_is_named_and_the_others_run(photographs, monkeypatch):
    def missing(root):
        raise ImportError("No module named 'nowhere'\nmore")

    kept = {OURS: DECODERS[OURS], "gone": DECODERS[OURS]._replace(prepare=missing)}
    monkeypatch.setattr(command, "DECODERS", kept)
    runs, absent = command.prepare({"originals": photographs})
    assert list(runs) == [f"{OURS} originals"]
    assert absent == {"gone": "No module named 'nowhere'"}


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(command, "DECODERS", {name: DECODERS[name] for name in (OURS, "pillow")})
    command.main(images=4, rounds=2)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert sum("| packed " in row for row in rows) == 1
    assert "Pillow, torchvision v2 on images" in printed
    assert "short side 256, quality 90" in printed
    assert "times as many images a second (target 2.00: " in printed
