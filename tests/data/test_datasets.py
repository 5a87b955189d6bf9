import pytest
import torch
from sklearn.datasets import load_digits

from r2d2fast.data import DATASETS, load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_digits_has_1437_images_to_train_on_and_a_stratified_360_to_test_on(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    shares = torch.bincount(digits.test_labels) / torch.bincount(digits.train_labels)
    assert ((shares - 360 / 1437).abs() < 0.02).all()


def test_train_and_test_together_are_the_data_set(digits):
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    pixels = load_digits().data
    std, mean = torch.std_mean(digits.train_images)
    assert mean.abs() < 1e-6
    assert (std - 1).abs() < 1e-6
    blank = digits.background
    scale = 16 / (images.max() - blank)
    restored = ((images - blank) * scale).round().to(torch.int64)
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, pixels.astype(int).tolist()))


def test_labels_belong_to_their_images(digits):
    pixels, labels = load_digits(return_X_y=True)
    label_of = {tuple(image): label for image, label in zip(pixels.astype(int).tolist(), labels, strict=True)}
    scale = 16 / (digits.train_images.max() - digits.background)
    for images, classes in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)):
        restored = ((images.flatten(1) - digits.background) * scale).round().to(torch.int64)
        assert [label_of[tuple(image)] for image in restored.tolist()] == classes.tolist()


def test_the_test_split_is_the_same_in_every_run(digits):
    torch.manual_seed(123)
    again = load_dataset("digits")
    assert torch.equal(digits.test_images, again.test_images)
    # Written down, so that a change of the split, which makes old errors incomparable, does not go unseen.
    assert digits.test_labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_an_unknown_name_is_refused_with_the_accepted_ones():
    with pytest.raises(ValueError, match=r"'mnits'.*accepted: digits"):
        load_dataset("mnits")
    assert list(DATASETS) == ["digits"]
