"""What a step works on: logits, a bank of unlabelled samples, and index batches that keep the bank out of the cache."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank

ALPHA, BETA = 0.1, 0.03
LABEL_LR = 4000.0
"""With D = B an effective step λα/D of at most 1.6, so that pseudo-logits settle however often a batch is repeated."""

Step = Callable[[Tensor], Sequence[Tensor | None]]
"""One whole step for an index batch; it returns (loss, gradient with respect to the logits) where it computes them."""


class Workload:
    """Logits ``[batch, classes]`` and a float32 bank of ``rows`` unlabelled samples, so that sample s owns row s."""

    def __init__(self, batch: int, classes: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(batch, classes, generator=generator)
        self.bank = PseudoLabelBank(torch.full((rows,), -1), classes)
        self.bank.pseudo_logits.normal_(generator=generator)
        # 64 batches of 1024 x 1000 are 262 MB of rows. One iterator for all steps: none finds in the cache the rows
        # that the one before it has just touched.
        batches = [torch.randperm(rows, generator=generator)[:batch] for _ in range(64)]
        self.indices = itertools.cycle(batches)

    @property
    def rows(self) -> Tensor:
        return self.bank.pseudo_logits

    def leaf(self) -> Tensor:
        """The logits as a leaf of their own that asks for a gradient, on the same memory."""
        return self.logits.detach().requires_grad_()
