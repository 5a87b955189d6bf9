"""Resident images: bit for bit what the definition of one image says, and the distributions that an augmentation promises."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms import RandAugment

from r2d2fast.data import resident as resident_module
from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.random_numbers import derive_seed, uniform
from r2d2fast.data.resident import ResidentImages, channel_statistics
from tests.data.keyed import keyed
from tests.data.waiting import NeverWaits

CPU = torch.device("cpu")
SHAPES = [(3, 7, 5), (1, 8, 8), (3, 4, 9)]
AUGMENTATIONS = [
    Augmentation(),
    Augmentation(translate=1),
    Augmentation(translate=4),
    Augmentation(translate=3, border="reflect"),
    Augmentation(flip=True),
    Augmentation(translate=2, border="reflect", flip=True, cutout=4),
    Augmentation(translate=2, flip=True, cutout=3),
    Augmentation(cutout=1),
    Augmentation(cutout=30),
]


def resident(shape, samples=40, device=CPU):
    pixels = torch.randint(0, 256, (samples, *shape), dtype=torch.uint8)
    mean, std = channel_statistics(pixels)
    return pixels, mean, std, ResidentImages(pixels, mean, std, device)


def one_batch(images, index, draws, augmentation, seed=0):
    (batch,) = images.batches([keyed(index, draws)], augmentation, seed)
    return batch


def mirrored(place, size):
    """The place that a mirror at the border pixels shows."""
    if place < 0:
        return -place
    return 2 * (size - 1) - place if place >= size else place


def definition(image, numbers, augmentation, mean, std):
    """One image, pixel by pixel: uint8 [C, H, W], five float32 numbers → float32 [C, H, W]."""
    _, height, width = image.shape
    t, side = augmentation.translate, augmentation.cutout
    down, right = (int(number * np.float32(2 * t + 1)) - t for number in numbers[:2])
    centre_row, centre_column = int(numbers[3] * np.float32(height)), int(numbers[4] * np.float32(width))
    result = np.empty(image.shape, dtype=np.float32)
    for r in range(height):
        for c in range(width):
            shown = width - 1 - c if augmentation.flip and numbers[2] < 0.5 else c
            row, column = r - down, shown - right
            if augmentation.border == "reflect":
                pixel = image[:, mirrored(row, height), mirrored(column, width)]
            elif 0 <= row < height and 0 <= column < width:
                pixel = image[:, row, column]
            else:
                pixel = np.zeros(len(image), dtype=np.uint8)
            top, left = centre_row - side // 2, centre_column - side // 2
            cut = top <= r < top + side and left <= c < left + side
            result[:, r, c] = 0 if cut else (pixel.astype(np.float32) - mean) * (np.float32(1) / std)
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_each_image_is_bit_for_bit_what_the_definition_makes_of_it(shape, augmentation):
    pixels, mean, std, images = resident(shape)
    index, draws = torch.randint(0, 40, (60,)), torch.arange(1000, 1060)
    batch = one_batch(images, index, draws, augmentation, seed=3)
    assert batch.shape == (60, *shape)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    numbers = uniform(3, draws, 5).numpy()
    expected = [
        definition(pixels[sample].numpy(), number, augmentation, mean.numpy(), std.numpy())
        for sample, number in zip(index.tolist(), numbers, strict=True)
    ]
    assert np.array_equal(batch.numpy(), np.stack(expected))
    assert torch.equal(images.on_device(augmentation, 3)(index, draws), batch)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation_sees_the_normalised_images(shape):
    pixels, mean, std, images = resident(shape)
    index = torch.tensor([5, 0, 39, 5])
    batch = one_batch(images, index, [0, 1, 2, 3], None)
    assert torch.equal(batch, (pixels[index].float() - mean[:, None, None]) * (1 / std)[:, None, None])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, one_batch(images, index, [0, 1, 2, 3], Augmentation()))


def test_length_shape_and_memory():
    pixels, _, _, images = resident((3, 7, 5), samples=11)
    assert (len(images), images.shape, images.nbytes) == (11, (3, 7, 5), pixels.numel())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_may_come_in_any_layout_and_are_not_changed(layout):
    pixels, mean, std, images = resident((3, 7, 5))
    given = pixels.contiguous(memory_format=layout)
    other = ResidentImages(given, mean, std, CPU)
    augmentation = AUGMENTATIONS[-3]
    index, draws = torch.arange(40), torch.arange(40)
    assert torch.equal(one_batch(other, index, draws, augmentation), one_batch(images, index, draws, augmentation))
    assert torch.equal(given, pixels)


# --- what decides an image's augmentation -------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4 * 3 * 7 * 5 * 25, 2**19])
def test_batches_differ_only_in_where_they_are_cut(monkeypatch, at_once):
    monkeypatch.setattr(resident_module, "_AT_ONCE", at_once)
    _, _, _, images = resident((3, 7, 5))
    augmentation = Augmentation(translate=2, border="reflect", flip=True, cutout=3)
    index, draws = torch.randperm(40), torch.arange(100, 140)
    whole = one_batch(images, index, draws, augmentation)
    for sizes in ([1] * 40, [16, 0, 24], [7, 33], [10, 15, 10, 5]):
        order = list(map(keyed, index.split(sizes), draws.split(sizes)))
        batches = list(images.batches(order, augmentation, 0))
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(torch.cat(batches), whole)
        assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)


def test_images_normalised_anew_are_so_in_augmented_batches_too():
    pixels, mean, std, images = resident((3, 7, 5))
    augmentation, index = Augmentation(translate=2, cutout=3), torch.arange(40)
    one_batch(images, index, index, augmentation)
    other, fresh = images.normalised_by(mean + 1, std * 2), ResidentImages(pixels, mean + 1, std * 2, CPU)
    assert torch.equal(one_batch(other, index, index, augmentation), one_batch(fresh, index, index, augmentation))


def test_seed_and_draw_decide():
    _, _, _, images = resident((3, 7, 5))
    augmentation = Augmentation(translate=2, border="reflect", flip=True, cutout=3)
    index = torch.arange(40)
    first = one_batch(images, index, torch.arange(40), augmentation)
    torch.manual_seed(99)
    assert torch.equal(one_batch(images, index, torch.arange(40), augmentation), first)
    assert not torch.equal(one_batch(images, index, torch.arange(40, 80), augmentation), first)
    assert not torch.equal(one_batch(images, index, torch.arange(40), augmentation, seed=1), first)


def test_no_batches():
    _, _, _, images = resident((1, 8, 8))
    assert list(images.batches([], Augmentation(), 0)) == []
    assert list(images.batches([], None, 0)) == []


# --- distributions ------------------------------------------------------------------------------------------------


def coordinates(count, augmentation, seed=0):
    """What ``count`` draws make of one 16 x 16 image whose pixel values are 16 · row + column, not normalised."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = ResidentImages(pixels, torch.zeros(1), torch.ones(1), CPU)
    batch = one_batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), augmentation, seed)
    return batch[:, 0]


@pytest.mark.parametrize("border", ["background", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("translate", [1, 2, 4])
def test_shifts_down_and_right_and_mirroring_are_uniform_and_independent(border, flip, translate):
    batch = coordinates(40_000, Augmentation(translate=translate, border=border, flip=flip))
    # Two pixels in the middle, which no shift takes out of the image: their order tells a mirror, their values the shift.
    left, right = batch[:, 8, 7].long(), batch[:, 8, 8].long()
    mirrored = (right - left) < 0
    down = 8 - left // 16
    across = torch.where(mirrored, 8, 7) - left % 16
    reach = 2 * translate + 1
    cells = ((down + translate) * reach + across + translate) * 2 + mirrored
    counts = torch.bincount(cells, minlength=2 * reach * reach)
    assert len(counts) == 2 * reach * reach
    possible = counts if flip else counts[::2]
    assert int(possible.sum()) == 40_000
    assert chisquare(possible.numpy()).pvalue > 1e-3


def test_the_cutout_centre_is_uniform_over_the_pixels_and_independent_of_the_rest():
    # Below 0 in every pixel, so that 0 is the cutout alone.
    pixels = torch.zeros(1, 1, 6, 8, dtype=torch.uint8)
    pixels[..., 4] = 1
    images = ResidentImages(pixels, torch.full((1,), 100.0), torch.ones(1), CPU)
    count = 60_000
    index, draws = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    batch = one_batch(images, index, draws, Augmentation(flip=True, cutout=1))
    cut = batch[:, 0] == 0
    assert cut.flatten(1).sum(1).tolist() == [1] * count
    centre = cut.flatten(1).int().argmax(1)
    uncut = one_batch(images, index, draws, Augmentation(flip=True))
    mirrored = (uncut[:, 0, 0, 3] > uncut[:, 0, 0, 4]).long()
    assert chisquare(torch.bincount(centre * 2 + mirrored, minlength=96).numpy()).pvalue > 1e-3


def test_the_cutout_is_clipped_at_the_border_and_not_moved_into_the_image():
    pixels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images = ResidentImages(pixels, torch.ones(1), torch.ones(1), CPU)
    batch = one_batch(images, torch.zeros(4000, dtype=torch.int64), torch.arange(4000), Augmentation(cutout=4))
    areas = (batch == 0).flatten(1).sum(1)
    # A centre at the border pixel keeps 2 of 4 rows; at the next 3; at the last 3, since an even square begins two before it.
    sides = torch.tensor([min(8, centre + 2) - max(0, centre - 2) for centre in range(8)])
    expected = (sides[:, None] * sides).flatten()
    assert sorted(set(areas.tolist())) == sorted(set(expected.tolist()))
    for area in set(expected.tolist()):
        share = float((expected == area).float().mean())
        assert abs(float((areas == area).float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_the_cutout_is_zero_after_normalisation_in_every_channel():
    _, _, _, images = resident((3, 8, 8))
    batch = one_batch(images, torch.arange(40), torch.arange(40), Augmentation(cutout=4))
    plain = one_batch(images, torch.arange(40), torch.arange(40), None)
    cut = (batch == 0).all(1, keepdim=True)
    assert 0.1 < float(cut.float().mean()) < 0.3
    assert torch.equal(batch, plain.masked_fill(cut, 0))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (Augmentation(translate=-1), r"translate is -1; accepted for images of 7 x 5 pixels.*'background': 0 to 5"),
        (Augmentation(translate=6), r"translate is 6.*0 to 5"),
        (Augmentation(translate=5, border="reflect"), r"translate is 5.*'reflect': 0 to 4"),
        (Augmentation(border="wrap"), r"border is 'wrap'; accepted: background, reflect"),
        (Augmentation(cutout=-2), r"cutout is -2; accepted: 0 for none"),
    ],
)
def test_an_impossible_augmentation_is_refused_before_the_first_batch(augmentation, message):
    _, _, _, images = resident((3, 7, 5))
    with pytest.raises(ValueError, match=message):
        images.batches([keyed(range(3))], augmentation, 0)


@pytest.mark.parametrize("augmentation", [None, Augmentation(translate=1)])
@pytest.mark.parametrize("sample", [40, -1])
def test_a_sample_that_is_not_there_is_an_error(augmentation, sample):
    _, _, _, images = resident((1, 8, 8))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        one_batch(images, [0, sample], [0, 1], augmentation)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_pixels_of_a_channel():
    pixels = torch.randint(0, 200, (50, 3, 6, 4), dtype=torch.uint8)
    pixels[:, 1] //= 7
    mean, std = channel_statistics(pixels)
    exact = pixels.double().numpy()
    assert mean.tolist() == exact.mean((0, 2, 3)).astype(np.float32).tolist()
    np.testing.assert_allclose(std, exact.std((0, 2, 3), ddof=1), rtol=1e-7)


def test_a_channel_of_one_value_is_normalised_to_0():
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    pixels[:, 2] = 17
    mean, std = channel_statistics(pixels)
    assert (float(mean[2]), float(std[2])) == (17, 1)
    batch = one_batch(ResidentImages(pixels, mean, std, CPU), torch.arange(5), torch.arange(5), None)
    assert torch.equal(batch[:, 2], torch.zeros(5, 4, 4))


# --- GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS, None], ids=str)
def test_nothing_waits_for_the_device(augmentation):
    _, _, _, images = resident((3, 7, 5))
    order = [keyed(range(4)), keyed(range(3))]
    with NeverWaits() as counted:
        assert len(list(images.batches(order, augmentation, 0))) == 2
    assert counted.calls > 5
    make = images.on_device(augmentation or Augmentation(), 0)
    with NeverWaits():
        make(torch.arange(4), torch.arange(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS, None], ids=str)
def test_on_a_gpu_the_host_never_waits_and_the_images_are_the_same(augmentation):
    pixels, mean, std, images = resident((3, 7, 5))
    on_gpu = ResidentImages(pixels, mean, std, torch.device("cuda"))
    order = [keyed(range(40)), keyed(range(3))]
    expected = list(images.batches(order, augmentation, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(on_gpu.batches(order, augmentation, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(batch.cpu(), want) for batch, want in zip(batches, expected, strict=True))


def test_randaugment_is_torchvision_s_with_a_seed_of_each_image_s_own_before_it_is_normalised():
    pixels, mean, std, images = resident((3, 8, 8))
    augmentation = Augmentation(randaugment=True)
    index, keys = torch.arange(6), torch.arange(100, 106)
    batch = one_batch(images, index, keys, augmentation, seed=5)
    for row, sample, key in zip(batch, index.tolist(), keys.tolist(), strict=True):
        torch.manual_seed(derive_seed(5, key))
        expected = RandAugment()(pixels[sample])
        torch.testing.assert_close(row, (expected - mean[:, None, None]) / std[:, None, None], rtol=1e-5, atol=1e-5)
    assert torch.equal(one_batch(images, index[2:4], keys[2:4], augmentation, seed=5), batch[2:4])
    assert not torch.equal(batch, one_batch(images, index, keys, Augmentation(), seed=5))
