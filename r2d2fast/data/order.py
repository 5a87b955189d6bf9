"""The order in which an epoch sees the samples, as a function of seed and epoch: there is no state to save.

With several ranks each computes the same global batches and takes its part of each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from r2d2fast.data.random_numbers import derive_seed

# Keys (see random_numbers.uniform): the epoch's number above, the place in the epoch's global order below.
_PLACES = 2**40
# What a permutation is for: no two of one run are the same by accident.
_EPOCH, _LABELLED, _PARTITION = range(3)


class Batch(NamedTuple):
    """The samples that a rank takes in one step, in training, prediction and evaluation.

    Attributes:
        samples: int64 ``[B]``, on the CPU: their numbers in the data set.
        keys: int64 ``[B]``, on the CPU: what each sample's random numbers are made from (``random_numbers.uniform``), another one
            for every use of a sample. None where nothing is random, that is without an augmentation.
        global_size: the number of samples in this step on all ranks together.
    """

    samples: Tensor
    keys: Tensor | None
    global_size: int


def keys_of(batch: Batch) -> Tensor:
    """The keys of a batch for training. Raises ValueError for one without."""
    if batch.keys is None:
        raise ValueError("a batch without keys has no random numbers for an augmentation; accepted: augmentation None")
    return batch.keys


def consecutive_batches(samples: Tensor, size: int) -> list[Batch]:
    """Batches for prediction and evaluation: ``samples`` (int64 ``[n]``) in their order, ``size`` at a time, nothing random.

    There are none where there are no samples, which happens on a rank where images are few.
    """
    return [Batch(index, None, len(index)) for index in samples.split(size) if len(index)]


class BatchSampler:
    """The batches of one rank.

    Args:
        labelled, unlabelled: int64, on the CPU, sample indices.
        seed: of the run.
        rank, ranks: which part of each global batch is wanted, of how many.
    """

    def __init__(self, labelled: Tensor, unlabelled: Tensor, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.seed = seed
        self.rank = rank
        self.ranks = ranks

    def partition(self, prediction: int) -> list[Tensor]:
        """The unlabelled samples of each rank from the prediction of all pseudo-labels with this number on.

        The order of all parts together depends on seed and number only, so that other numbers of ranks cut it elsewhere.
        """
        order = self._permuted(self.unlabelled, _PARTITION, prediction)
        # As torch.chunk does, which is how DTensor shards: the last parts may be smaller, or empty.
        parts = list(order.chunk(self.ranks))
        return parts + [order[:0]] * (self.ranks - len(parts))

    def shuffled(self, samples: Tensor, size: int, epoch: int) -> Iterator[Batch]:
        """One pass over ``samples`` (int64 ``[n]``) in the order of an epoch, :func:`shuffled_steps` batches.

        The last global batch may be smaller than ``size``.
        """
        order = self._permuted(samples, _EPOCH, epoch)
        keys = epoch * _PLACES + torch.arange(len(order))
        for step in range(shuffled_steps(len(samples), size, self.ranks)):
            part = slice(step * size, min((step + 1) * size, len(order)))
            own_index, own_keys = (tensor[part].tensor_split(self.ranks)[self.rank] for tensor in (order, keys))
            yield Batch(own_index, own_keys, part.stop - part.start)

    def mixed(self, sizes: tuple[int, int], epoch: int, pass_number: int, prediction: int) -> Iterator[Batch]:
        """One pass over the unlabelled samples, :func:`mixed_steps` batches, labelled ones after them in each.

        What does not fill a batch is left out of this pass (reference implementation). The labelled ones are an endless
        stream, reshuffled whenever all have been seen, which runs on over the passes, so that each is seen equally often.

        Args:
            sizes: unlabelled and labelled samples of a global batch, multiples of ``ranks``.
            epoch: its number in the run.
            pass_number: its number in the stage.
            prediction: the number of the partition.
        """
        unlabelled, labelled = sizes
        total = unlabelled + labelled
        own = self._permuted(self.partition(prediction)[self.rank], _EPOCH, epoch)
        steps = mixed_steps(len(self.unlabelled), unlabelled, self.ranks)
        taken = pass_number * steps * labelled
        stream = self._stream(taken, taken + steps * labelled)
        mine, few = unlabelled // self.ranks, labelled // self.ranks
        keys = torch.cat([self.rank * mine + torch.arange(mine), unlabelled + self.rank * few + torch.arange(few)]) + (
            epoch * _PLACES
        )
        for step in range(steps):
            first = step * labelled + self.rank * few
            index = torch.cat([own[step * mine : (step + 1) * mine], stream[first : first + few]])
            yield Batch(index, keys + step * total, total)

    def _stream(self, begin: int, end: int) -> Tensor:
        """The places ``begin`` … ``end`` − 1 of the endless stream of labelled samples."""
        size = len(self.labelled)
        rounds = range(begin // size, -(-end // size))
        parts = [self._permuted(self.labelled, _LABELLED, round) for round in rounds]
        return torch.cat(parts)[begin - rounds.start * size : end - rounds.start * size] if parts else self.labelled[:0]

    def _permuted(self, samples: Tensor, purpose: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose, number))
        return samples[torch.randperm(len(samples), generator=generator)]


def shuffled_steps(samples: int, size: int, ranks: int) -> int:
    """Batches of a shuffled pass. A last one of less than two samples a rank is left out: batch norm cannot use it."""
    return samples // size + (samples % size >= 2 * ranks)


def mixed_steps(unlabelled: int, size: int, ranks: int) -> int:
    """Batches of a mixed pass, for which the smallest part of a partition has samples; others leave a few more out."""
    smallest = unlabelled - (ranks - 1) * -(-unlabelled // ranks)
    return max(smallest, 0) // (size // ranks)
