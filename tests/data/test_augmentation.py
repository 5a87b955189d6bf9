import torch

from r2d2fast.data import translate

FILL = -7.0


def shifted(image, down, right):
    """The definition: pixel (r, c) of the result is pixel (r − down, c − right) of the image, or empty."""
    result = torch.full_like(image, FILL)
    height, width = image.shape[1:]
    for r in range(height):
        for c in range(width):
            if 0 <= r - down < height and 0 <= c - right < width:
                result[:, r, c] = image[:, r - down, c - right]
    return result


def shift_of(image, result, pixels):
    """The one shift that makes ``result`` of ``image``; None if none does."""
    reach = range(-pixels, pixels + 1)
    found = [(d, r) for d in reach for r in reach if torch.equal(shifted(image, d, r), result)]
    return found[0] if len(found) == 1 else None


def test_each_image_is_shifted_by_its_own_whole_pixels_and_all_shifts_occur():
    images = torch.randn(300, 2, 5, 7)
    results = translate(images, 1, FILL, torch.Generator().manual_seed(0))
    assert results.shape == images.shape
    shifts = [shift_of(image, result, 1) for image, result in zip(images, results, strict=True)]
    assert set(shifts) == {(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)}


def test_larger_shifts():
    images = torch.randn(100, 1, 6, 6)
    results = translate(images, 2, FILL, torch.Generator().manual_seed(0))
    shifts = {shift_of(image, result, 2) for image, result in zip(images, results, strict=True)}
    assert None not in shifts
    assert {d for d, _ in shifts} == {r for _, r in shifts} == {-2, -1, 0, 1, 2}


def test_the_generator_decides():
    images = torch.randn(20, 1, 8, 8)
    results = [translate(images, 1, FILL, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_no_shift_leaves_the_images_alone():
    images = torch.randn(3, 1, 4, 4)
    assert torch.equal(translate(images, 0, FILL, torch.Generator()), images)
