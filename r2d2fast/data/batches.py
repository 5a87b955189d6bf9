"""Batches of sample indices: the order in which a stage sees the data."""

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One pass over ``indices`` (int64 ``[n]``) in a fresh order: ⌈n / batch_size⌉ batches, the last may be smaller."""
    order = torch.randperm(len(indices), generator=generator, device=indices.device)
    yield from indices[order].split(batch_size)


class LabelledStream:
    """An endless stream over the labelled samples, reshuffled whenever all have been seen.

    It runs on across epochs, so each labelled sample is seen equally often however short an epoch is.

    Args:
        indices: int64 ``[n]``, the labelled samples.
        generator: on the device of ``indices``.

    Attributes:
        queue: int64, samples of the current order that are still to come; with the generator it is the whole state.
    """

    def __init__(self, indices: Tensor, generator: torch.Generator) -> None:
        self.indices = indices
        self.generator = generator
        self.queue = indices[:0]

    def take(self, count: int) -> Tensor:
        """The next ``count`` samples, int64 ``[count]``."""
        while len(self.queue) < count:
            order = torch.randperm(len(self.indices), generator=self.generator, device=self.indices.device)
            self.queue = torch.cat([self.queue, self.indices[order]])
        taken, self.queue = self.queue[:count], self.queue[count:]
        return taken


def mixed_batches(
    unlabelled: Tensor, stream: LabelledStream, unlabelled_size: int, labelled_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """One pass over the samples ``unlabelled`` (int64 ``[U]``), each batch with labelled ones of ``stream`` after them.

    The ``U % unlabelled_size`` samples that are over are left out of this pass (reference implementation).
    """
    for batch in shuffled_batches(unlabelled, unlabelled_size, generator):
        if len(batch) == unlabelled_size:
            yield torch.cat([batch, stream.take(labelled_size)])
