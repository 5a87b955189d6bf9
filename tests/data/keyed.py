"""Batches for training, as a sampler makes them on one rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r2d2fast.data import Batch


def keyed(index: Sequence[int] | Tensor, keys: Sequence[int] | Tensor | None = None) -> Batch:
    """A batch of samples, with the keys of their random numbers; by default the numbers from 1000 on, sample by sample."""
    index = torch.as_tensor(index, dtype=torch.int64)
    return Batch(index, index + 1000 if keys is None else torch.as_tensor(keys, dtype=torch.int64), len(index))
