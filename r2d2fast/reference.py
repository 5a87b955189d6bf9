"""The D2 step, defined: plain PyTorch in float64, to be read against the paper line by line.

Every other backend is tested against this file. ŷ is ``logits``, ỹ ``pseudo_logits``, p = p̂ = softmax(ŷ), q = p̃ = softmax(ỹ),
L_c the class loss and L_e the entropy; "Eq." and "Table" are those of Wang & Wu, AAAI 2020 (arXiv 1908.04345).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2d2fast.options import StepOptions
from r2d2fast.rounding import random_bits, saturate, stochastic_round


@dataclass(eq=False)
class Bank:
    """What a step needs of a bank; :class:`r2d2fast.PseudoLabelBank` makes and keeps one."""

    pseudo_logits: Tensor  # [U, N]: one row ỹ an unlabelled sample
    slots: Tensor  # int32 [M]: a row number, or −1−label
    updates: Tensor  # int64 [1]: how many so far, the counter of stochastic rounding
    status: Tensor  # int32 [2], for GPU kernels: blocks that have finished (0 between steps), and what went wrong
    label_scale: float  # K
    rounding: str  # "nearest" or "stochastic"
    seed: int


class D2Step(NamedTuple):
    loss: Tensor  # scalar Σ_i L_i / D
    grad: Tensor  # [B, N] = ∂loss/∂ŷ, times grad_scale
    row_losses: Tensor  # [B]: L_i


def class_loss_rows(log_p: Tensor, log_q: Tensor, class_loss: str) -> Tensor:
    """L_c of every row ``[B]`` from log-probabilities ``[B, N]``, differentiable in both."""
    p, q = log_p.exp(), log_q.exp()
    if class_loss == "kl_reverse":
        return (p * (log_p - log_q)).sum(1)  # KL(p̂‖p̃), the loss of Eq. 5 and 6
    if class_loss == "kl":
        return (q * (log_q - log_p)).sum(1)  # KL(p̃‖p̂), the loss of Eq. 14 (Table 4)
    return ((q - p) ** 2).sum(1)  # ‖p̃ − p̂‖², the loss of Eq. 15 (Table 4)


def d2_loss(
    logits: Tensor, pseudo_logits: Tensor, *, alpha: float, beta: float, class_loss: str, normalizer: float
) -> Tensor:
    """The loss for autograd: Σ_i (α L_c + β L_e)_i / D of ŷ and ỹ ``[B, N]``, differentiable in both."""
    log_p, log_q = logits.log_softmax(1), pseudo_logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)  # L_e
    return (alpha * class_loss_rows(log_p, log_q, class_loss) + beta * entropy).sum() / normalizer


def _gradients(
    log_p: Tensor, log_q: Tensor, alpha: float | Tensor, beta: float | Tensor, class_loss: str
) -> tuple[Tensor, Tensor]:
    """∂L_i/∂ŷ and ∂L_i/∂ỹ ``[B, N]`` in closed form."""
    p, q = log_p.exp(), log_q.exp()

    def mean(weights: Tensor, values: Tensor) -> Tensor:
        return (weights * values).sum(1, keepdim=True)

    if class_loss == "kl_reverse":
        d_logits = p * (log_p - log_q - mean(p, log_p - log_q))  # Eq. 5
        d_pseudo = q - p  # Eq. 6
    elif class_loss == "kl":
        d_logits = p - q  # Eq. 14
        d_pseudo = q * (log_q - log_p - mean(q, log_q - log_p))
    else:
        d_logits = 2 * p * (p - q - mean(p, p - q))  # Eq. 15
        d_pseudo = 2 * q * (q - p - mean(q, q - p))
    d_entropy = -p * (log_p - mean(p, log_p))
    return alpha * d_logits + beta * d_entropy, alpha * d_pseudo


def log_pseudo_probs(slots: Tensor, bank: Bank) -> Tensor:
    """log p̃ ``[B, N]`` in float64 for entries of the slot table: a row's log-softmax, or that of K·onehot(label)."""
    classes = bank.pseudo_logits.shape[1]
    rows = bank.pseudo_logits.new_zeros((len(slots), classes), dtype=torch.float64)
    unlabelled = slots >= 0
    rows[unlabelled] = bank.pseudo_logits[slots[unlabelled]].double()
    rows[~unlabelled, -1 - slots[~unlabelled]] = bank.label_scale
    return rows.log_softmax(1)


def lookup(index: Tensor, slots: Tensor) -> Tensor:
    """Entries of the slot table for sample indices, int64 ``[B]``; IndexError names the first index outside ``[0, M)``."""
    outside = ((index < 0) | (index >= len(slots))).nonzero()
    if len(outside):
        raise IndexError(out_of_range(int(index[outside[0, 0]]), int(outside[0, 0]), len(slots)))
    return slots[index.long()].long()


def out_of_range(value: int, position: int, samples: int) -> str:
    return (
        f"index[{position}] is {value}, but the bank holds samples 0 … {samples - 1}. Nothing was written. "
        "Pass each sample's position in the `labels` that the bank was made from."
    )


def last_occurrence(slots: Tensor) -> Tensor:
    """Which entries ``[B]`` have no equal entry after them: those whose update counts (duplicates: the last occurrence
    wins)."""
    values, group = slots.unique(return_inverse=True)
    position = torch.arange(len(slots), device=slots.device)
    last = torch.zeros_like(values).scatter_reduce(0, group, position, "amax")
    return last[group] == position


@torch.no_grad()
def d2_step(logits: Tensor, index: Tensor, bank: Bank, **options: Any) -> D2Step:
    """One D2 step: the loss of a batch, its gradient, and (``update``) the pseudo-logits moved in place.

    ``logits`` ``[B, N]``, any float dtype; ``index`` int32 or int64 ``[B]``; ``options`` are fields of :class:`StepOptions`. All
    results are float64. The rows written are the last occurrence of each unlabelled sample whose logits and pseudo-logits are
    finite. Raises IndexError, with nothing written, for an index outside ``[0, M)``.
    """
    alpha, beta, label_lr, grad_scale, class_loss, *_ = step = StepOptions(**options)
    divisor, update_divisor = step.normalizers(len(logits))
    slots = lookup(index, bank.slots)
    log_p, log_q = logits.double().log_softmax(1), log_pseudo_probs(slots, bank)

    entropy = -(log_p.exp() * log_p).sum(1)
    row_losses = alpha * class_loss_rows(log_p, log_q, class_loss) + beta * entropy  # L = α L_c + β L_e
    d_logits, d_pseudo = _gradients(log_p, log_q, alpha, beta, class_loss)
    finite = logits.isfinite().all(1) & log_q.isfinite().all(1)
    row_losses = row_losses.where(finite, torch.nan)

    if step.update:
        written = (slots >= 0) & finite & last_occurrence(slots)
        rows = slots[written]
        moved = bank.pseudo_logits[rows].double() - label_lr * d_pseudo[written] / update_divisor  # Eq. 7
        bank.pseudo_logits[rows] = round_rows(moved, rows, bank)
        bank.updates += 1
    grad = (d_logits / divisor).where(finite[:, None], torch.nan) * grad_scale
    return D2Step(row_losses.sum() / divisor, grad, row_losses)


def round_rows(values: Tensor, rows: Tensor, bank: Bank) -> Tensor:
    """float64 pseudo-logits ``[R, N]`` for the given row numbers in the bank's dtype, by the bank's rounding."""
    dtype = bank.pseudo_logits.dtype
    if bank.rounding == "nearest":
        return saturate(values, dtype)
    classes = values.shape[1]
    element = rows[:, None] * classes + torch.arange(classes, device=rows.device)
    return stochastic_round(values.float(), random_bits(element, int(bank.updates), bank.seed), dtype)
