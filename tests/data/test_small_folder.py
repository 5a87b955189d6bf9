"""Folders whose images all have one small size: which those are, their pixels, and what is not as it should be."""

import numpy as np
import pytest
import torch
from PIL import Image

from r2d2fast.data import Augmentation, PhotographImages, PhotographOptions, ResidentImages, consecutive_batches
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import load_folder, load_imagenet, small_image_shape
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.packing import pack
from tests.data.keyed import keyed
from tests.data.small_photographs import encoded, piece

CPU = torch.device("cpu")
SKIP = PhotographOptions(on_bad_image="skip")


def write(root, mode="RGB", size=(20, 16), format="PNG", train=10, val=4):
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            path = root / part / "ab"[number % 2] / f"{number:02}.{format.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(piece(number, *size).convert(mode), format))
    return root


def pixels_of(paths, mode="RGB"):
    """By Pillow: float32 [M, C, H, W]."""
    images = np.stack([np.array(Image.open(path).convert(mode), dtype=np.float32) for path in sorted(paths)])
    return torch.from_numpy(images if mode == "RGB" else images[..., None]).permute(0, 3, 1, 2)


def evaluation(images):
    (batch,) = images.batches(consecutive_batches(torch.arange(len(images)), 1000), None, 0)
    return batch


@pytest.mark.parametrize(
    ("mode", "format", "channels"),
    [("RGB", "PNG", 3), ("RGB", "JPEG", 3), ("L", "PNG", 1), ("L", "JPEG", 1), ("1", "PNG", 1)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_images_of_one_small_size_are_decoded_once_and_kept(tmp_path, mode, format, channels, packed):
    root = write(tmp_path / "images", mode, format=format)
    converted = "RGB" if channels == 3 else "L"
    train, test = (pixels_of((root / part).glob("*/*"), converted) for part in ("train", "val"))
    if packed:
        pack(root, tmp_path / "packed", quality=100)
        root = tmp_path / "packed"
    assert small_image_shape(root) == ((channels if format == "JPEG" or not packed else 3), 16, 20)
    data = load_folder(root, CPU)
    assert isinstance(data.train, ResidentImages)
    assert data.train_labels.tolist() == [0] * 5 + [1] * 5
    assert data.train_names[0] == f"a/00.{format.lower()}"
    if packed and format == "PNG":
        return  # packing has encoded them, as JPEG in colour
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.double().std((0, 2, 3), keepdim=True).float()
    torch.testing.assert_close(evaluation(data.train), (train - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluation(data.test), (test - mean) / std, rtol=1e-5, atol=1e-5)


def test_the_augmentation_is_that_of_small_images(tmp_path):
    data = load_folder(write(tmp_path), CPU)
    (batch,) = data.train.batches([keyed(range(10))], Augmentation(translate=2, cutout=4, border="reflect"), 1)
    assert (batch.shape, (batch == 0).any()) == ((10, 3, 16, 20), True)


def test_one_image_in_colour_makes_all_of_them_rgb(tmp_path):
    write(tmp_path, "L")
    (tmp_path / "train/a/00.png").write_bytes(encoded(piece(0, 20, 16), "PNG"))
    assert small_image_shape(tmp_path) == (3, 16, 20)
    batch = evaluation(load_folder(tmp_path, CPU).train)
    assert batch.shape == (10, 3, 16, 20)


@pytest.mark.parametrize(
    ("size", "other", "small"),
    [((64, 64), (64, 64), True), ((65, 64), (65, 64), False), ((20, 16), (16, 20), False), ((20, 16), (20, 16), True)],
)
def test_what_counts_as_small(tmp_path, size, other, small):
    write(tmp_path, size=size)
    (tmp_path / "val/b/other.png").write_bytes(encoded(piece(0, *other), "PNG"))
    assert (small_image_shape(tmp_path) is not None) == small
    kind = ResidentImages if small else PhotographImages
    assert isinstance(load_folder(tmp_path, CPU).train, kind)


def test_imagenet_is_photographs_whatever_its_size(tmp_path):
    """A copy at 64 pixels is 16 GB once decoded, and its recipe is that of photographs."""
    assert load_imagenet(write(tmp_path), CPU).train.shape == (3, 224, 224)


def test_no_folder_and_no_image_are_not_small(tmp_path):
    assert small_image_shape(tmp_path / "missing") is None
    assert small_image_shape(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"no image", encoded(piece(0, 20, 16), quality=95)[:400]])
def test_a_damaged_image_is_named_or_replaced_by_the_mean_colour(tmp_path, content):
    whole = evaluation(load_folder(write(tmp_path / "whole"), CPU).train)
    root = write(tmp_path / "damaged")
    (root / "train/b/01.png").write_bytes(content)
    (root / "val/a/00.png").write_bytes(content)
    with pytest.raises(BadImageError, match=r"^b/01\.png: .*--on-bad-image skip"):
        load_folder(root, CPU)
    data = load_folder(root, CPU, SKIP)
    assert (list(data.train.bad_images), list(data.test.bad_images)) == (["b/01.png"], ["a/00.png"])
    number = list(data.train_names).index("b/01.png")
    batch = evaluation(data.train)
    # Its neighbours are as they were, but for the mean and deviation, in which it is not counted.
    assert batch[number].abs().max() < 0.02
    assert evaluation(data.test)[0].abs().max() < 0.02
    others = [n for n in range(10) if n != number]
    torch.testing.assert_close(batch[others].mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert (batch[others] - whole[others]).abs().mean() < 0.2


def test_what_cannot_be_read_is_an_error_even_where_bad_images_are_skipped(tmp_path):
    write(tmp_path)
    (tmp_path / "train/a/gone.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"cannot read a/gone\.png: .*Too many levels"):
        load_folder(tmp_path, CPU, SKIP)


def test_without_a_single_good_training_image(tmp_path):
    write(tmp_path)
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 10 training images can be decoded; accepted"):
        load_folder(tmp_path, CPU, SKIP)
