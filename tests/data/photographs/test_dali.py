"""DALI's batches against the CPU's. Here DALI runs on the CPU too; ``pytest -m gpu`` runs the same on a GPU."""

import shutil

import pytest
import torch

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import load_folder
from r2d2fast.data.names import Names
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.images import FolderFiles, PhotographImages
from r2d2fast.data.photographs.options import STD, PhotographOptions
from r2d2fast.data.photographs.packing import pack
from tests.data.keyed import keyed
from tests.data.small_photographs import encoded, piece, pixels, write_tree

FLIP = Augmentation(flip=True)
# A pixel's value of 255, once normalised.
ONE = 1 / (255 * min(STD))


pytestmark = pytest.mark.extra("nvidia.dali")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here (torch.cuda.is_available() is False)")
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"), width=150, height=110)


def order(*batches):
    return [keyed(batch) for batch in batches]


def assert_same_images(one, other):
    """Within 1 of 255, and the outermost pixels, where DALI repeats the border of what was cut, within 16."""
    torch.testing.assert_close(one[:, :, 1:-1, 1:-1], other[:, :, 1:-1, 1:-1], rtol=0, atol=1.01 * ONE)
    torch.testing.assert_close(one, other, rtol=0, atol=16 * ONE)


def load(root, decoder="dali", device="cpu", **options):
    return load_folder(root, torch.device(device), PhotographOptions(32, 40, decoder=decoder, **options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", [FLIP, None])
def test_batches_are_the_cpu_s(root, device, workers, augmentation):
    batches = order(list(range(12)), [3], [7, 1], [7, 7, 0])
    expected = list(load(root, "cpu").train.batches(batches, augmentation, 5))
    found = list(load(root, device=device, workers=workers).train.batches(batches, augmentation, 5))
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == device
        assert one.dtype == torch.float32
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert_same_images(one.cpu(), other)


def test_a_packed_folder_and_two_passes_at_once(root, tmp_path, device):
    pack(root, tmp_path / "packed", short_side=64)
    expected = [
        batch for _ in range(2) for batch in load(tmp_path / "packed", "cpu").test.batches(order([0, 5], [2]), None, 0)
    ]
    images = load(tmp_path / "packed", device=device).test
    passes = [images.batches(order([0, 5], [2]), None, 0) for _ in range(2)]
    found = [next(one) for _ in range(2) for one in passes]
    for one, other in zip(found, [expected[0], expected[0], expected[1], expected[1]], strict=True):
        assert_same_images(one.cpu(), other)


# Big-endian EXIF data of one entry, orientation 6.
EXIF_SIDEWAYS = b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def kinds():
    whole = encoded(piece(0))
    return {
        "plain.jpg": whole,
        "grey.jpg": encoded(piece(1).convert("L")),
        "cmyk.jpg": encoded(piece(2).convert("CMYK")),
        "rgb.jpg": encoded(piece(3), keep_rgb=True),
        "progressive.jpg": encoded(piece(4), progressive=True),
        "full chroma.jpg": encoded(piece(5), subsampling=0),
        "odd.jpg": encoded(piece(6, 95, 71)),
        "sideways.jpg": whole[:2] + EXIF_SIDEWAYS + whole[2:],
        "after the end.jpg": whole + b"\0" * 5,
        "much after the end.jpg": whole + b"\0" * 500,
        "palette.png": encoded(piece(7).convert("P"), "PNG"),
        "row.jpg": encoded(piece(0).resize((300, 1))),
        "pixel.jpg": encoded(piece(0).resize((1, 1))),
    }


@pytest.mark.parametrize("augmentation", [FLIP, None])
def test_every_kind_of_image_is_what_the_cpu_makes_of_it(tmp_path, augmentation, device):
    assert (pixels(kinds()["sideways.jpg"]) == pixels(kinds()["plain.jpg"])).all()
    for name, data in kinds().items():
        (tmp_path / name).write_bytes(data)
    files = FolderFiles(tmp_path, Names.of(sorted(kinds())))
    # All together, and those that the loader makes by itself: alone, first, last.
    batches = order(list(range(len(kinds()))), *([number] for number in range(len(kinds()))))
    expected, found = (
        list(
            PhotographImages(files, torch.device(where), PhotographOptions(32, 40, decoder=decoder)).batches(
                batches, augmentation, 3
            )
        )
        for decoder, where in (("cpu", "cpu"), ("dali", device))
    )
    for one, other in zip(found, expected, strict=True):
        assert_same_images(one.cpu(), other)


# --- bad images


@pytest.fixture
def damaged(root, tmp_path):
    """A tree whose training samples 1 and 8 are damaged: a JPEG file whose Huffman tables are nonsense, and no image."""
    copy = shutil.copytree(root, tmp_path / "damaged")
    path = copy / "train/china/002.jpg"
    before, table, after = path.read_bytes().partition(b"\xff\xc4")
    path.write_bytes(before + table + after[:3] + b"\xff" * 16 + after[19:])
    (copy / "train/flower/005.jpg").write_text("not an image")
    return copy


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_an_error_that_names_it(damaged, workers, device):
    images = load(damaged, workers=workers, device=device).train
    with pytest.raises(BadImageError, match=r"^china/002\.jpg: not a readable image .*--on-bad-image skip"):
        list(images.batches(order([0], [0, 1, 2], [3]), FLIP, 0))
    with pytest.raises(BadImageError, match=r"^flower/005\.jpg: not a readable image"):
        list(images.batches(order([8]), FLIP, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_skipped_image_it_goes_on(damaged, root, workers, device):
    batches = order([0, 2], [0, 1, 8, 3], [8], [4, 5, 6])
    images = load(damaged, workers=workers, on_bad_image="skip", device=device).train
    found = [batch.cpu() for batch in images.batches(batches, FLIP, 0)]
    assert images.bad_images.keys() == {"china/002.jpg", "flower/005.jpg"}
    assert found[1][1:3].abs().max() < 0.01
    assert found[2].abs().max() < 0.01
    whole = list(load(root, "cpu").train.batches(batches, FLIP, 0))
    for one, other in ((found[0], whole[0]), (found[1][[0, 3]], whole[1][[0, 3]]), (found[3], whole[3])):
        assert_same_images(one, other)


def test_a_file_that_cannot_be_read_is_an_error_even_where_bad_images_are_skipped(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    images = load(copy, on_bad_image="skip").train
    (copy / "train/china/000.jpg").unlink()
    (copy / "train/china/000.jpg").symlink_to("000.jpg")
    with pytest.raises(DataError, match=r"cannot read .*china/000\.jpg.*Too many levels"):
        list(images.batches(order([0, 1]), None, 0))


def test_where_only_dali_fails_it_is_not_hidden(root, monkeypatch):
    def fail(pipeline):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("r2d2fast.data.photographs.dali._Pipeline.take", fail)
    with pytest.raises(
        DataError, match=r"DALI failed at images that the CPU can decode; --resume --decoder cpu goes.*out of memory"
    ):
        list(load(root).train.batches(order([0, 1]), None, 0))


def test_where_dali_cannot_start_there_is_a_way_out(root, monkeypatch):
    def fail(pipeline, encoded):
        raise RuntimeError("driver version is insufficient")

    monkeypatch.setattr("r2d2fast.data.photographs.dali._Pipeline.give", fail)
    with pytest.raises(DataError, match=r"--decoder dali: DALI cannot work here; --decoder cpu .*driver version"):
        list(load(root).train.batches(order([0, 1]), None, 0))
