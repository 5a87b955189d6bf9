"""Numbers for the samples of data sets of every kind."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from r2d2fast import with_index

X, Y = torch.arange(10.0)[:, None], torch.arange(10)


class Dicts(Dataset):
    """As those of Hugging Face: mappings, and whole batches at once."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": X[index], "y": int(Y[index])}

    def __getitems__(self, indices):
        self.asked = indices
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    "dataset", [TensorDataset(X, Y), Subset(TensorDataset(X, Y), range(10)), list(zip(X, Y, strict=True))]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_comes_after_what_the_data_set_gives(dataset, workers):
    batches = list(DataLoader(with_index(dataset), 4, shuffle=True, num_workers=workers))
    x, y, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert index.dtype == torch.int64
    assert torch.equal(y, index)
    assert torch.equal(x[:, 0], index.float())
    assert sorted(index.tolist()) == list(range(10))


def test_of_single_values_and_of_lists():
    assert with_index(["a", "b"])[1] == ("b", 1)
    assert with_index([["a", 5], ["b", 6]])[1] == ("b", 6, 1)


def test_of_mappings_that_come_in_batches():
    dataset = Dicts()
    batches = list(DataLoader(with_index(dataset), 5, sampler=[3, 1, 4, 5, 9]))
    assert batches[0]["index"].tolist() == batches[0]["y"].tolist() == [3, 1, 4, 5, 9]
    assert dataset.asked == [3, 1, 4, 5, 9]


def test_is_the_place_in_the_whole_data_set():
    """Of a subset of the numbered one; and of a place that is counted from the end, or is a tensor."""
    numbered = with_index(TensorDataset(X, Y))
    assert Subset(numbered, [7, 2])[1][2] == 2
    assert numbered[-1][2] == 9
    assert type(numbered[torch.tensor(3)][2]) is int
    assert len(numbered) == 10
    assert pickle.loads(pickle.dumps(numbered))[4][2] == 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))

    def __len__(self):
        return 10


@pytest.mark.parametrize("dataset", [Stream(), iter([1, 2])])
def test_what_has_no_numbers_is_refused(dataset):
    with pytest.raises(TypeError, match=rf"map-style data set.*got {type(dataset).__name__}"):
        with_index(dataset)


def test_a_key_of_the_data_set_s_own_is_kept():
    with pytest.raises(ValueError, match="have a key 'index' already"):
        with_index([{"index": 3}])[0]
