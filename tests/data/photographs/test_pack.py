"""The packed copy: its contents, its format, and what may go wrong while it is written or read."""

import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import load_folder, load_imagenet
from r2d2fast.data.pack import main
from r2d2fast.data.photographs import packing
from r2d2fast.data.photographs.decode import BadImageError, decode
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.photographs.packed import open_packed
from r2d2fast.data.photographs.packing import pack
from tests.data.keyed import keyed
from tests.data.small_photographs import encoded, piece, write_class_folders, write_tree
from tests.limits import file_size_limit

CPU = torch.device("cpu")
SMALL = PhotographOptions(32, 40)
ORDER = [keyed([3, 0, 11], [5, 6, 7])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"), width=300, height=220)


@pytest.fixture(scope="module")
def packed(root):
    pack(root, root.parent / "packed", short_side=64)
    return root.parent / "packed"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def no_leftovers(directory):
    return not [path.name for path in directory.iterdir() if path.name.endswith((".partial", ".lock"))]


# --- contents


def test_the_same_names_labels_and_classes(root, packed):
    ours, originals = (load_folder(path, CPU, SMALL) for path in (packed, root))
    assert list(ours.train_names) == list(originals.train_names)
    assert torch.equal(ours.train_labels, originals.train_labels)
    assert torch.equal(ours.test_labels, originals.test_labels)
    assert list(ours.class_names) == list(originals.class_names)
    assert len(load_imagenet(packed, CPU, SMALL).train) == 12


def test_images_have_the_short_side_and_the_quality(root, packed):
    files = open_packed(packed).train.files
    table = Image.open(io.BytesIO(encoded(piece(0), quality=90))).quantization
    for sample, path in enumerate(sorted((root / "train").glob("*/*"))):
        image, original = Image.open(io.BytesIO(files.read(sample))), Image.open(path)
        assert min(image.size) == 64
        assert image.width / image.height == pytest.approx(original.width / original.height, rel=0.02)
        assert image.quantization == table


def test_evaluation_sees_almost_the_same_images(tmp_path):
    write_tree(tmp_path / "originals", 2, 4, width=420, height=360)
    pack(tmp_path / "originals", tmp_path / "packed")
    ours, originals = (
        next(load_folder(tmp_path / name, CPU).test.batches([keyed(range(4))], None, 0))
        for name in ("packed", "originals")
    )
    # What JPEG of quality 90 costs here is 0.049 standard deviations of ImageNet's pixels; quality 75, 0.072.
    assert 0 < (ours - originals).abs().mean() < 0.06


def test_batches_depend_on_neither_workers_nor_processes(packed):
    alone, shared = (
        next(load_folder(packed, CPU, replace(SMALL, workers=workers)).train.batches(ORDER, Augmentation(flip=True), 1))
        for workers in (0, 2)
    )
    assert torch.equal(alone, shared)
    load = load_folder(packed, CPU, SMALL).train.loading(Augmentation(flip=True), 1)
    copy = pickle.loads(pickle.dumps(load))
    assert torch.equal(load(ORDER[0])[0], copy(ORDER[0])[0])


def test_a_packed_copy_is_the_same_for_any_number_of_workers(root, packed, tmp_path):
    pack(root, tmp_path / "two", short_side=64, workers=2)
    assert contents(tmp_path / "two") == contents(packed)


def test_original_size_keeps_jpeg_files_as_they_are(root, tmp_path):
    (root.parent / "kinds" / "train").mkdir(parents=True, exist_ok=True)
    source = shutil.copytree(root, tmp_path / "source")
    (source / "train/china/zz.png").write_bytes(encoded(piece(0).convert("RGBA"), "PNG"))
    assert main([str(source), str(tmp_path / "packed"), "--original-size", "--workers", "0"]) == 0
    files = open_packed(tmp_path / "packed").train.files
    for sample, name in enumerate(files.names):
        data = bytes(files.read(sample))
        if name.endswith(".png"):
            np.testing.assert_allclose(decode(data, name).astype(int), np.array(piece(0)), atol=60)
            assert data.startswith(b"\xff\xd8")
        else:
            assert data == (source / "train" / name).read_bytes()
    assert json.loads((tmp_path / "packed/pack.json").read_text())["short_side"] is None


def test_smaller_images_are_not_enlarged(root, tmp_path):
    pack(root, tmp_path / "packed", short_side=4000)
    assert bytes(open_packed(tmp_path / "packed").train.files.read(0)) == (root / "train/china/000.jpg").read_bytes()


def test_a_copy_without_test_images(tmp_path):
    write_class_folders(tmp_path / "source", 6)
    assert main([str(tmp_path / "source"), str(tmp_path / "packed"), "--workers=0", "--test-fraction=0"]) == 0
    data = load_folder(tmp_path / "packed", CPU, SMALL)
    assert (len(data.train), len(data.test)) == (6, 0)
    assert len(next(data.train.batches([keyed(range(6))], None, 0))) == 6


def test_the_format_is_as_described(packed):
    # Read by the description in packed.py, with nothing of r2d2fast's.
    header = json.loads((packed / "pack.json").read_text())
    assert {key: header[key] for key in ("format", "version", "short_side", "quality", "classes")} == {
        "format": "r2d2fast-pack",
        "version": 1,
        "short_side": 64,
        "quality": 90,
        "classes": ["china", "flower"],
    }
    for name, count in (("train", 12), ("test", 6)):
        described = header["parts"][name]
        images, index = ((packed / f"{name}.{ending}").read_bytes() for ending in ("images", "npz"))
        assert described == {"images": count, "bytes": len(images), "index_crc32": zlib.crc32(index), "skipped": {}}
        arrays = np.load(packed / f"{name}.npz")
        assert {key: arrays[key].dtype.str for key in arrays} == {
            "ends": "<i8",
            "crc32": "<u4",
            "labels": "<i8",
            "names": "|u1",
            "name_ends": "<i8",
        }
        assert arrays["ends"][-1] == len(images)
        second = images[arrays["ends"][0] : arrays["ends"][1]]
        assert zlib.crc32(second) == arrays["crc32"][1]
        assert Image.open(io.BytesIO(second)).size in {(87, 64), (64, 87)}
        assert bytes(arrays["names"][: arrays["name_ends"][0]]) == b"china/000.jpg"
        assert arrays["labels"].tolist() == [0] * (count // 2) + [1] * (count // 2)
    assert sorted(contents(packed)) == ["pack.json", "test.images", "test.npz", "train.images", "train.npz"]


# --- bad images


@pytest.fixture
def damaged(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "damaged")
    path = copy / "train/china/004.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    (copy / "val/flower/001.jpg").write_bytes(b"")
    return copy


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_image_stops_packing_and_is_named(damaged, tmp_path, capsys, workers):
    assert main([str(damaged), str(tmp_path / "packed"), "--workers", workers]) == 1
    assert "china/004.jpg: damaged JPEG file" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
    assert no_leftovers(tmp_path)


def test_bad_images_are_skipped_counted_and_listed(damaged, tmp_path, capsys):
    assert main([str(damaged), str(tmp_path / "packed"), "--workers", "0", "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "train: 11 images" in printed
    assert "1 skipped\n  china/004.jpg: damaged JPEG file" in printed
    header = json.loads((tmp_path / "packed/pack.json").read_text())
    assert list(header["parts"]["test"]["skipped"]) == ["flower/001.jpg"]
    data = load_folder(tmp_path / "packed", CPU, SMALL)
    assert "china/004.jpg" not in data.train_names
    assert (len(data.train), len(data.test)) == (11, 5)
    assert data.train_labels.tolist() == [0] * 5 + [1] * 6
    assert len(next(data.train.batches([keyed(range(11))], None, 0))) == 11


def test_a_part_without_a_single_good_image(root, tmp_path):
    write_class_folders(tmp_path / "source/train", 4)
    for name in ("china", "flower"):
        path = tmp_path / "source/val" / name / "0.jpg"
        path.parent.mkdir(parents=True)
        path.write_text("no image")
    with pytest.raises(DataError, match=r"none of the 2 images of part 'test' can be decoded"):
        pack(tmp_path / "source", tmp_path / "packed", on_bad_image="skip")
    assert not (tmp_path / "packed").exists()


def test_an_image_too_long_for_jpeg(tmp_path):
    write_tree(tmp_path / "source", 2, 2)
    (tmp_path / "source/train/china/long.png").write_bytes(encoded(Image.new("RGB", (70_000, 1)), "PNG"))
    with pytest.raises(BadImageError, match=r"long\.png: 70000 x 1 pixels are more than JPEG can hold"):
        pack(tmp_path / "source", tmp_path / "packed")


def test_an_unreadable_image_is_an_error_even_where_bad_ones_are_skipped(root, tmp_path):
    source = shutil.copytree(root, tmp_path / "source")
    (source / "train/china/gone.jpg").symlink_to("gone.jpg")
    with pytest.raises(DataError, match=r"cannot read china/gone\.jpg.*Too many levels"):
        pack(source, tmp_path / "packed", on_bad_image="skip")


# --- writing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, r"--short-side is 0; accepted"),
        ({"quality": 0}, r"--quality is 0; accepted: 1 to 100"),
        ({"workers": -1}, r"--workers is -1; accepted: 0 or more"),
    ],
)
def test_arguments_out_of_range(root, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        pack(root, tmp_path / "packed", **options)


def test_nothing_is_packed_twice_or_over(root, packed, tmp_path):
    with pytest.raises(DataError, match=r"is packed already"):
        pack(packed, tmp_path / "again")
    with pytest.raises(DataError, match=r"packed exists; remove it"):
        pack(root, packed)


def test_a_full_disk_leaves_nothing(root, tmp_path, capsys):
    with file_size_limit(20_000):
        status = main([str(root), str(tmp_path / "packed"), "--workers", "0"])
    assert status == 1
    message = f"cannot write {tmp_path}/packed.partial/train.images: File too large. Free some space"
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_full_while_the_header_is_written(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device\. Free some space"):
        pack(root, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_passes_for_good_and_the_next_begins_anew(tmp_path):
    write_tree(tmp_path / "source", 200, 4, width=300, height=220)
    dest = tmp_path / "packed"
    arguments = [sys.executable, "-m", "r2d2fast.data.pack", tmp_path / "source", dest, "--workers", "0"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    partial = tmp_path / "packed.partial/train.images"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not dest.exists()
    assert partial.exists()
    with pytest.raises(DataError):
        load_folder(tmp_path / "packed.partial", CPU)
    pack(tmp_path / "source", dest)
    assert no_leftovers(tmp_path)
    assert len(load_folder(dest, CPU).train) == 200


def test_two_processes_do_not_write_the_same_copy(root, tmp_path):
    with open(tmp_path / "packed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is writing to .*packed"):
            pack(root, tmp_path / "packed")
    pack(root, tmp_path / "packed")


def test_a_destination_that_cannot_be_made(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/packed: "):
        pack(root, tmp_path / "file/packed")


# --- reading


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def edit_header(directory, **fields):
    header = json.loads((directory / "pack.json").read_text())
    (directory / "pack.json").write_text(json.dumps(header | fields))


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit_header(d, version=2), r"its version is 2; this r2d2fast reads 1"),
        (lambda d: edit_header(d, format="x"), r"its format is 'x'"),
        (lambda d: edit_header(d, parts={}), r"no 'train'"),
        (lambda d: (d / "pack.json").write_text("{"), r"Pack the images again"),
        (lambda d: (d / "pack.json").write_text("[]"), r"Pack the images again"),
        (lambda d: os.truncate(d / "train.images", 1000), r"train\.images has 1000 bytes, not \d+"),
        (lambda d: os.remove(d / "test.images"), r"No such file"),
        (lambda d: flip_byte(d / "test.npz", 200), r"test\.npz is damaged \(checksum\)"),
    ],
)
def test_a_copy_that_is_not_whole_is_refused(copy, spoil, message):
    spoil(copy)
    with pytest.raises(DataError, match=rf"copy is not a packed data set that can be used: .*{message}"):
        load_folder(copy, CPU)


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_flipped_bit_is_found_whatever_the_decoder_thinks_of_it(copy, on_bad_image):
    ends = np.load(copy / "train.npz")["ends"]
    # In the colour table: it decodes all the same.
    flip_byte(copy / "train.images", int(ends[2]) + 30)
    images = load_folder(copy, CPU, replace(SMALL, on_bad_image=on_bad_image)).train
    batches = images.batches(ORDER, None, 0)
    if on_bad_image == "error":
        with pytest.raises(BadImageError, match=r"^china/006\.jpg: .*train\.images is damaged here \(checksum\)"):
            list(batches)
    else:
        assert len(list(batches)) == 1
        assert list(images.bad_images) == ["china/006.jpg"]
