"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """A copy of a network, whose parameters follow those of the original.

    Args:
        network: which goes on to be trained. Its parameters stay the same tensors.

    Attributes:
        model: the copy.
    """

    def __init__(self, network: nn.Module) -> None:
        self.model = copy.deepcopy(network)
        # Once: to look for them in the modules takes half a millisecond, as long as a tenth of a linear classifier's step.
        self._parameters = list(zip(self.model.parameters(), network.parameters(), strict=True))
        self._buffers = list(zip(self.model.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, share: float | Tensor) -> None:
        """``average ← average + share · (network − average)`` for every parameter; buffers become those of the network.

        ``share``: 0 to 1, 1 − the decay; a scalar on the network's device where the step is captured.
        """
        for average, current in self._parameters:
            average.lerp_(current, share)
        for buffer, value in self._buffers:
            buffer.copy_(value)
