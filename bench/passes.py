"""A network around the step, as in training: its passes put data and code of the step out of the near caches."""

import time

import torch
from torch import nn

from bench.workload import Step, Workload

INPUTS, HIDDEN = 128, 2048


class Passes:
    """A network with one hidden layer, whose tensors, gradients and momentum add up to some 80 MB at 1024 x 1000, 28 MB at
    512 x 10: computed, not measured."""

    def __init__(self, workload: Workload) -> None:
        batch, classes = workload.logits.shape
        self._workload = workload
        self._inputs = torch.randn(batch, INPUTS, generator=torch.Generator().manual_seed(0))
        self._network = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes)
        )
        # At a rate of 0 the logits stay the same, whoever comes next.
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.0, momentum=0.9)

    def sample(self, step: Step) -> float:
        """Seconds of ``step`` between the forward pass, which writes the logits, and the backward pass of its gradient: processor
        time, because a wait for a core that somebody else has would be longer than the step, and hit the long ones most."""
        output = self._network(self._inputs)
        self._workload.logits.copy_(output.detach())
        index = next(self._workload.indices)
        began = time.thread_time()
        found = step(index)
        seconds = time.thread_time() - began
        gradient = found[-1] if found else None
        output.backward(torch.zeros_like(output) if gradient is None else gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return seconds
