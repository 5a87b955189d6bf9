"""The definition as a backend: any device, any dtype. Its indexing makes the host wait for a GPU."""

import torch
from torch import Tensor

from r2d2fast import reference
from r2d2fast._backends.common import STATISTICS, BackendStatus
from r2d2fast.options import StepOptions
from r2d2fast.reference import Bank


def status() -> BackendStatus:
    return BackendStatus(True, "PyTorch in float64 on any device and dtype; slow, the definition")


def why_not(logits: Tensor, rows: Tensor) -> str | None:
    return None


@torch.no_grad()
def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    options: StepOptions,
    statistics: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if statistics is not None:
        statistics += _row_statistics(logits, index, bank, options.class_loss)
    result = reference.d2_step(logits, index, bank, **options._asdict())
    loss = result.row_losses if options.reduction == "none" else result.loss
    grad = result.grad.to(logits.dtype) if out is None else out.copy_(result.grad)
    return loss.to(torch.promote_types(logits.dtype, torch.float32)), grad


def _row_statistics(logits: Tensor, index: Tensor, bank: Bank, class_loss: str) -> Tensor:
    slots = reference.lookup(index, bank.slots)
    log_p, log_q = logits.double().log_softmax(1), reference.log_pseudo_probs(slots, bank)
    finite = logits.isfinite().all(1) & log_q.isfinite().all(1)
    counted = (slots >= 0) & finite
    tops = [x == x.amax(1, keepdim=True) for x in (log_p, log_q)]
    rows = {
        "rows": torch.ones_like(log_p[:, 0]),
        "class_loss": reference.class_loss_rows(log_p, log_q, class_loss),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "prediction_confidence": log_p.amax(1).exp(),
        "pseudo_confidence": log_q.amax(1).exp(),
        "agreement": (tops[0] & tops[1]).any(1).double(),
    }
    sums = [rows[name][counted].sum() for name in STATISTICS[:-1]]
    return torch.stack([*sums, (~finite).sum().double()])


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    slots = reference.lookup(index, bank.slots)
    due = (slots >= 0) & reference.last_occurrence(slots)
    finite = logits.isfinite().all(1)
    set_now = due & finite
    bank.pseudo_logits[slots[set_now]] = reference.saturate(logits[set_now], bank.pseudo_logits.dtype)
    skipped = (due & ~finite).nonzero()
    return len(skipped), int(skipped[0, 0]) if len(skipped) else -1


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float | Tensor, keep: bool) -> Tensor:
    return grad * (grad_output / grad_scale)
