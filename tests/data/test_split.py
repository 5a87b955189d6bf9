import pytest
import torch

from r2d2fast.data import split_labels

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


@pytest.mark.parametrize("num_labels", [0, -10, 55])
def test_a_number_of_labels_that_no_class_balance_fits_is_refused(num_labels):
    with pytest.raises(ValueError, match=f"num_labels is {num_labels}; it must be a positive multiple of the 10"):
        split_labels(TARGETS, 10, num_labels, split=0)


def test_more_labels_than_a_class_has_samples_are_refused():
    assert (split_labels(TARGETS, 10, 200, split=0) == TARGETS).all()
    with pytest.raises(ValueError, match=r"210.*only 20.*up to 200"):
        split_labels(TARGETS, 10, 210, split=0)
