"""Everything that is timed: the fused step, the baselines, and what autograd itself costs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench import baselines
from bench.workload import ALPHA, BETA, LABEL_LR, Step, Workload
from r2d2fast import FusedD2Loss, d2_step


class Implementation(NamedTuple):
    description: str
    prepare: Callable[[Workload], Step]
    only_classes: int | None = None
    """The only N at which it is timed: a small one, where the overhead of calls rules."""


def fused_step(workload: Workload) -> Step:
    logits, bank = workload.logits, workload.bank
    return lambda index: d2_step(logits, index, bank, alpha=ALPHA, beta=BETA, label_lr=LABEL_LR)


def fused_in_place(workload: Workload) -> Step:
    """Between calls back to back the logits of all are then gradients, small ones; no time depends on them."""
    logits, bank = workload.logits, workload.bank
    return lambda index: d2_step(logits, index, bank, alpha=ALPHA, beta=BETA, label_lr=LABEL_LR, out=logits)


def fused_module(workload: Workload) -> Step:
    logits = workload.leaf()
    criterion = FusedD2Loss(workload.bank, alpha=ALPHA, beta=BETA, label_lr=LABEL_LR)

    def step(index: Tensor) -> Sequence[Tensor | None]:
        logits.grad = None
        loss = criterion(logits, index)
        loss.backward()
        return loss.detach(), logits.grad

    return step


def scalar_backward(workload: Workload) -> Step:
    """What autograd itself costs: the smallest graph there is."""
    y = torch.ones((), requires_grad=True)

    def step(index: Tensor) -> Sequence[Tensor | None]:
        (y * 1.0).backward()
        return ()

    return step


IMPLEMENTATIONS = {
    "d2_step": Implementation("r2d2fast.d2_step", fused_step),
    "in place": Implementation("r2d2fast.d2_step, gradient over the logits", fused_in_place),
    "module": Implementation("FusedD2Loss, forward and backward", fused_module, only_classes=10),
    "a": Implementation("eager autograd", baselines.eager_autograd),
    "b": Implementation("autograd under torch.compile", baselines.compiled_autograd),
    "c": Implementation("closed form under torch.compile", baselines.compiled_closed_form),
    "d": Implementation("bank as a CPU parameter, own autograd function", baselines.parameter_bank),
    "e": Implementation("floor: only moving the same bytes", baselines.copies),
    "scalar": Implementation("(y * 1.0).backward() on a scalar", scalar_backward, only_classes=10),
}


def implementations(classes: int) -> dict[str, Implementation]:
    """Those that are timed at this number of classes, in the order of their turns."""
    return {name: one for name, one in IMPLEMENTATIONS.items() if one.only_classes in (None, classes)}
