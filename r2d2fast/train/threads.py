"""How many CPU threads compute a step.

A thread more gains where the operations of a step are long, and costs where they are short: the others wait for it at the end of
each operation, and where another program has its core they wait until the scheduler gives that back, which takes milliseconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# A thread's part of an operation is to be so long, in floating-point operations: a millisecond or two on a CPU of today.
WORK_OF_A_THREAD = 50e6


def choose_threads(model: nn.Module, shape: tuple[int, ...], batch: int) -> int:
    """How many threads suit a step of ``model``, which is on a CPU, with ``batch`` inputs of ``shape`` on this process.

    At most as many as PyTorch has now, that is, the number of cores, ``OMP_NUM_THREADS``, or what torchrun has set; one for each
    :data:`WORK_OF_A_THREAD` in the forward pass of the average convolution or linear layer. It is computed and not measured, so
    that the same command takes the same number, on which the last bits of results depend.
    """
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(training)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    work = counter.get_total_flops() * batch / max(layers, 1)
    return max(1, min(torch.get_num_threads(), int(work / WORK_OF_A_THREAD)))


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """PyTorch, and the D2 step, compute with ``number`` threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
