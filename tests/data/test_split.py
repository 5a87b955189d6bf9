import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from r2d2fast.data.split import proportional_counts, split_labels

TARGETS = torch.arange(200) % 10


def test_every_class_gets_the_same_number_of_true_labels():
    labels = split_labels(TARGETS, num_classes=10, num_labels=50, split=0)
    labelled = labels >= 0
    assert labels.dtype == torch.int64
    assert torch.equal(labels[labelled], TARGETS[labelled])
    assert torch.bincount(labels[labelled], minlength=10).tolist() == [5] * 10
    assert set(labels[~labelled].tolist()) == {-1}


def test_the_split_number_alone_decides_the_draw():
    first = split_labels(TARGETS, 10, 50, split=0)
    torch.manual_seed(99)
    assert torch.equal(split_labels(TARGETS, 10, 50, split=0), first)
    assert not torch.equal(split_labels(TARGETS, 10, 50, split=1), first)


def test_a_split_is_the_same_in_every_version():
    """Written down: errors over other labels cannot be compared."""
    labels = split_labels(TARGETS, 10, 10, split=0)
    assert (labels >= 0).nonzero().flatten().tolist() == [28, 29, 40, 46, 63, 112, 131, 165, 187, 194]


def test_a_number_that_is_no_multiple_is_shared_out_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(20, 1000, rng.integers(2, 9))
        number = int(rng.integers(len(counts), counts.sum() // 2))
        targets = np.repeat(np.arange(len(counts)), counts)
        train, _ = train_test_split(targets, train_size=number, stratify=targets, random_state=0)
        ours = proportional_counts(counts.tolist(), number)
        assert sum(ours) == number
        # Theirs draws among equal remainders; no class of theirs is rare here.
        exact = number * counts / counts.sum()
        if exact.min() >= 1 and len(set(np.round(exact % 1, 9))) == len(exact):
            assert ours == np.bincount(train).tolist()
    assert proportional_counts([1000, 1, 1], 10) == [8, 1, 1]
    targets = torch.tensor([0] * 150 + [1] * 50)
    assert torch.bincount(split_labels(targets, 2, 7, split=0) + 1).tolist() == [193, 5, 2]


def test_one_number_for_each_class():
    labels = split_labels(TARGETS, 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], split=0)
    assert torch.bincount(labels[labels >= 0]).tolist() == list(range(1, 11))
    assert torch.equal(split_labels(TARGETS, 10, [5] * 10, split=3), split_labels(TARGETS, 10, 50, split=3))
    with pytest.raises(
        ValueError, match=r"2,181 asks for 181 samples of class 1, which has only 180 whose class is known$"
    ):
        split_labels(TARGETS.clamp(max=1), 2, [2, 181], split=0)


@pytest.mark.parametrize("num_labels", [0, -10, 9])
def test_fewer_labels_than_classes_are_refused(num_labels):
    with pytest.raises(ValueError, match=f"num_labels is {num_labels}; it must be at least 10, one for each class"):
        split_labels(TARGETS, 10, num_labels, split=0)


def test_more_labels_than_a_class_has_samples_are_refused():
    assert (split_labels(TARGETS, 10, 200, split=0) == TARGETS).all()
    with pytest.raises(ValueError, match=r"210 asks for 21 samples of class 0, which has only 20.*up to 200"):
        split_labels(TARGETS, 10, 210, split=0)


def test_samples_of_unknown_class_are_never_drawn():
    targets = TARGETS.clone()
    targets[::3] = -1
    known = torch.bincount(targets[targets >= 0])
    labels = split_labels(targets, 10, 10 * int(known.min()), split=0)
    assert (labels[::3] == -1).all()
    assert torch.equal(labels[labels >= 0], targets[labels >= 0])
    assert torch.bincount(labels[labels >= 0]).tolist() == [int(known.min())] * 10
    with pytest.raises(ValueError, match=rf"has only {int(known.min())} whose class is known"):
        split_labels(targets, 10, 200, split=0)


def test_a_class_that_no_sample_has_is_named():
    with pytest.raises(ValueError, match=r"class 10, which has only 0 whose class is known; accepted: up to 0"):
        split_labels(TARGETS, 11, 11, split=0)
    with pytest.raises(ValueError, match=r"class 0, which has only 0"):
        split_labels(torch.full((5,), -1), 2, 2, split=0)


def test_every_sample_of_a_class_is_drawn_equally_often():
    targets = torch.tensor([1, 0, -1, 1, 0, 1, 0, -1, 0, 1])
    drawn = sum((split_labels(targets, 2, 2, split) >= 0).int() for split in range(4000))
    expected = torch.where(targets >= 0, 1000, 0)
    assert (drawn - expected).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert (drawn[targets < 0] == 0).all()
