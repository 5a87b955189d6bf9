"""The five baselines: the same D2 step as a PyTorch user would write it, and the floor of moving its bytes.

Each takes a :class:`Workload` and returns its step: loss, gradient with respect to the logits, and the bank's rows
moved in place, for unlabelled samples, ``kl_reverse`` and D = B. They index the bank directly, without a slot table.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.workload import ALPHA, BETA, LABEL_LR, Step, Workload


def d2_loss(logits: Tensor, rows: Tensor) -> Tensor:
    log_p, log_q = logits.log_softmax(1), rows.log_softmax(1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(1)
    entropy = -(p * log_p).sum(1)
    return (ALPHA * divergence + BETA * entropy).mean()


def closed_form(logits: Tensor, index: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient without autograd; written around one exponential per logit and pseudo-logit."""
    size = logits.shape[0]
    rows = bank[index]
    logits = logits - logits.amax(1, keepdim=True)
    shifted = rows - rows.amax(1, keepdim=True)
    exp_p, exp_q = logits.exp(), shifted.exp()
    sum_p, sum_q = exp_p.sum(1, keepdim=True), exp_q.sum(1, keepdim=True)
    p, q = exp_p / sum_p, exp_q / sum_q
    log_p, log_q = logits - sum_p.log(), shifted - sum_q.log()
    weights = ALPHA * (log_p - log_q) - BETA * log_p
    row_losses = (p * weights).sum(1, keepdim=True)
    bank[index] = rows - (LABEL_LR * ALPHA / size) * (q - p)
    return row_losses.sum() / size, p * (weights - row_losses) * (1 / size)


def eager_autograd(workload: Workload) -> Step:
    return _autograd_step(workload, d2_loss)


def compiled_autograd(workload: Workload) -> Step:
    return _autograd_step(workload, torch.compile(d2_loss, fullgraph=True, dynamic=False))


def _autograd_step(workload: Workload, loss_function: Callable[[Tensor, Tensor], Tensor]) -> Step:
    logits, bank = workload.leaf(), workload.rows

    def step(index: Tensor) -> Sequence[Tensor | None]:
        logits.grad = None
        rows = bank.index_select(0, index).requires_grad_()
        loss = loss_function(logits, rows)
        loss.backward()
        assert rows.grad is not None
        # The gathered rows are free to be overwritten, and index_copy_ is faster here than index_add_ or index_put_.
        bank.index_copy_(0, index, rows.detach().sub_(rows.grad, alpha=LABEL_LR))
        return loss.detach(), logits.grad

    return step


def compiled_closed_form(workload: Workload) -> Step:
    logits, bank = workload.logits, workload.rows
    compiled = torch.compile(closed_form, fullgraph=True, dynamic=False)
    return lambda index: compiled(logits, index, bank)


def parameter_bank(workload: Workload) -> Step:
    logits, bank = workload.leaf(), torch.nn.Parameter(workload.rows)

    def step(index: Tensor) -> Sequence[Tensor | None]:
        logits.grad = None
        caught: list[Tensor] = []
        loss = d2_loss(logits, _GatheredRows.apply(bank, index, caught))
        loss.backward()
        with torch.no_grad():
            bank[index] = bank[index] - LABEL_LR * caught[0]
        return loss.detach(), logits.grad

    return step


class _GatheredRows(torch.autograd.Function):
    """Rows of the bank; their gradient is handed to the caller, since as a gradient of the bank it would be [U, N]."""

    @staticmethod
    def forward(ctx, bank, index, caught):  # type: ignore[no-untyped-def]
        ctx.caught = caught
        return bank[index]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.caught.append(grad)
        return None, None, None


def copies(workload: Workload) -> Step:
    """The floor: bank rows read and written, logits read, gradients written, nothing computed."""
    logits, bank = workload.logits, workload.rows
    gradient = torch.empty_like(logits)

    def step(index: Tensor) -> Sequence[Tensor | None]:
        # A buffer for the rows (out=) is no faster than the allocator here, and slower on small batches.
        bank.index_copy_(0, index, bank.index_select(0, index))
        return (gradient.copy_(logits),)

    return step
