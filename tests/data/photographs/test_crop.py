"""Crops and resizing against torchvision's."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from r2d2fast.data.photographs.crop import (
    RANDOM_NUMBERS,
    centre_crop,
    random_crop,
    random_rectangle,
    resized,
    resized_shape,
)
from r2d2fast.data.random_numbers import uniform
from tests.data.small_photographs import piece

SHAPES = [(375, 500), (500, 333), (72, 96), (96, 72), (20, 30), (300, 40), (1, 300), (300, 1), (1, 1)]


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def torchvision_crops(height, width, count):
    transform = v2.RandomResizedCrop(8)
    image = torch.empty(3, height, width, device="meta")
    found = [transform.make_params([image]) for _ in range(count)]
    return np.array([[one[key] for key in ("top", "left", "height", "width")] for one in found])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (96, 72), (60, 100), (20, 31)])
def test_crops_are_distributed_as_torchvision_s(height, width):
    torch.manual_seed(0)
    count = 3000
    theirs = torchvision_crops(height, width, count)
    ours = np.array(
        [random_rectangle(height, width, row) for row in uniform(0, torch.arange(count), RANDOM_NUMBERS).tolist()]
    )
    for column in range(4):
        # Kolmogorov-Smirnov: with equal distributions the gap exceeds this once in 10 000 times.
        values = np.arange(max(height, width) + 1)
        below = [np.searchsorted(np.sort(crops[:, column]), values, side="right") / count for crops in (ours, theirs)]
        assert np.abs(below[0] - below[1]).max() < 2.23 * (2 / count) ** 0.5
    # Their joint distribution, too: areas, ratios.
    for statistic in (lambda crops: crops[:, 2] * crops[:, 3], lambda crops: crops[:, 3] / crops[:, 2]):
        means, deviations = zip(*((statistic(c).mean(), statistic(c).std()) for c in (ours, theirs)), strict=True)
        assert abs(means[0] - means[1]) < 4 * deviations[1] * (2 / count) ** 0.5
        assert deviations[0] == pytest.approx(deviations[1], rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(300, 6), (6, 300), (1, 300), (300, 1)])
def test_the_fallback_is_torchvision_s(height, width):
    # Ratios at which none of ten tries fits.
    expected = {tuple(row) for row in torchvision_crops(height, width, 20)}
    assert {
        random_rectangle(height, width, row) for row in uniform(0, torch.arange(20), RANDOM_NUMBERS).tolist()
    } == expected
    assert len(expected) == 1


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops_lie_within_the_image_for_all_numbers(height, width):
    # A float32 below 1 can be this large.
    for number in (0.0, 1 - 2**-24, 0.5):
        top, left, h, w = random_rectangle(height, width, [number] * RANDOM_NUMBERS)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_training_view_is_torchvision_s_resized_crop_bit_by_bit(height, width, mirrored):
    image = piece(1).resize((width, height))
    numbers = uniform(3, torch.arange(1), RANDOM_NUMBERS)[0].tolist()
    numbers[-1] = 0.3 if mirrored else 0.7
    expected = F.resized_crop(as_tensor(image), *random_rectangle(height, width, numbers), [32, 32], antialias=True)
    view = random_crop(height, width, 32, numbers, flip=True).of(np.array(image))
    assert (view.dtype, view.shape) == (torch.uint8, (1, 3, 32, 32))
    assert torch.equal(view[0], expected.flip(-1) if mirrored else expected)
    assert torch.equal(random_crop(height, width, 32, numbers, flip=False).of(np.array(image))[0], expected)


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (72, 96), (96, 72), (40, 41), (32, 32), (160, 10)]
)
@pytest.mark.parametrize(("short_side", "size"), [(40, 32), (37, 32), (32, 32)])
def test_an_evaluation_view_is_torchvision_s_resize_and_centre_crop_bit_by_bit(height, width, short_side, size):
    image = piece(0).resize((width, height))
    transform = v2.Compose([v2.Resize(short_side, antialias=True), v2.CenterCrop(size)])
    view = centre_crop(height, width, short_side, size).of(np.array(image))
    assert torch.equal(view[0], transform(as_tensor(image)))


@pytest.mark.parametrize(("height", "width"), [(400, 9), (9, 400), (1, 200)])
def test_of_very_long_images_evaluation_sees_the_same_centre(height, width):
    image = piece(0).resize((width, height))
    transform = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(32)])
    difference = centre_crop(height, width, 40, 32).of(np.array(image))[0].int() - transform(as_tensor(image)).int()
    assert difference.abs().float().mean() < 1


def test_a_line_of_60000_pixels_needs_no_gigabytes():
    # Resized as it is, it would have 256 x 15 360 000 pixels.
    for height, width in ((1, 60_000), (60_000, 1)):
        view = centre_crop(height, width, 256, 224)
        assert max(view.rows, view.columns) == 16 * 256
        assert view.of(np.zeros((height, width, 3), np.uint8)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("height", "width"), SHAPES[:6])
def test_resizing_the_short_side_gives_torchvision_s_sizes_and_pixels(height, width):
    image = piece(0).resize((width, height))
    expected = F.resize(as_tensor(image), [17], antialias=True)
    assert torch.equal(resized(np.array(image), resized_shape(height, width, 17))[0], expected)
