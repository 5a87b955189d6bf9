"""Any data set, with the sample numbers that the loss asks for."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from torch.utils.data import Dataset, IterableDataset


def with_index(dataset: Any) -> Dataset[Any]:
    """``dataset`` with the number of each sample after what it gives: ``(…, index)``, and of a mapping its key ``"index"``.

    The number is the sample's place in ``dataset``, so that the labels of a :class:`r2d2fast.PseudoLabelBank` must be in the same
    order: split and shuffle before, with ``torch.utils.data.Subset`` say, or leave the order to a sampler.

    Args:
        dataset: map-style, with ``__getitem__`` and ``__len__``: of PyTorch, torchvision, Hugging Face, or a list.

    Raises:
        TypeError: ``dataset`` is not map-style.

    Example:
        >>> for images, classes, index in DataLoader(with_index(CIFAR10(root, transform=transform)), 512, shuffle=True):
        ...     loss = criterion(model(images), index)
    """
    map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not map_style or isinstance(dataset, IterableDataset):  # which has a __getitem__ that only raises
        raise TypeError(
            f"with_index() numbers the samples of a map-style data set, with __getitem__ and __len__; got "
            f"{type(dataset).__name__}. Of an iterable one, let each item bring its place in the labels along"
        )
    return _WithIndex(dataset)


class _WithIndex(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SupportsIndex) -> Any:
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        return _add(self.dataset[number], number)

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Any]:
        """A batch at once, as DataLoader asks: the data set may have a faster way than item by item."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        numbers = [operator.index(index) for index in indices]
        return [_add(item, number) for item, number in zip(self.dataset.__getitems__(numbers), numbers, strict=True)]


def _add(item: Any, index: int) -> Any:
    if isinstance(item, Mapping):
        if "index" in item:
            raise ValueError("the items of this data set have a key 'index' already; rename it, then use with_index()")
        return {**item, "index": index}
    return (*item, index) if isinstance(item, tuple | list) else (item, index)
