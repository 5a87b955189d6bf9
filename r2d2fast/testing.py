"""A backend's step against the definition in float64, in units of the error that rounding allows.

For tests, the doctor and benchmarks: :func:`check_step` makes a step and compares it; :func:`expect` and :func:`compare` are its
halves, for a step that several backends make.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2d2fast import reference
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.loss import d2_step
from r2d2fast.options import StepOptions

_ROUNDINGS = 4.0
"""How many float32 roundings of a row's largest log-probability its arithmetic may add up to."""
_SAME_BITS = 0.005
"""Stochastic rounding: the share of elements whose float32 value may fall on the other side of its random threshold."""


class Mismatch(AssertionError):
    """A backend's result is not what it must be; the message says where."""


def make_bank(
    samples: int, classes: int, *, scale: float = 2.0, labelled_every: int = 3, **options: Any
) -> PseudoLabelBank:
    """A bank with every third sample labelled and random pseudo-logits; equal arguments give equal banks, on every device."""
    generator = torch.Generator().manual_seed(samples * 1009 + classes)
    labels = torch.full((samples,), -1, device="cpu")
    if labelled_every:
        labelled = labels[::labelled_every]
        labelled.copy_(torch.randint(classes, labelled.shape, generator=generator, device="cpu"))
    bank = PseudoLabelBank(labels, classes, **{"device": torch.get_default_device(), **options})
    rows = torch.randn(bank.pseudo_logits.shape, generator=generator, device="cpu")
    bank.pseudo_logits.copy_(rows * scale)
    return bank


@dataclass(frozen=True)
class Expected:
    """The definition's results of a step, and how far float32 arithmetic may be off in each row, before the result is rounded to
    its dtype: some roundings of the largest log-probability of p̂ and p̃, weighed with the largest probability."""

    loss: Tensor  # [1], or that of each row
    grad: Tensor
    rows: Tensor  # of the bank after the step, not rounded
    rounded_rows: Tensor
    updates: Tensor
    before: Tensor  # the bank's rows before the step
    untouched: Tensor  # rows that are nobody's in this step
    samples: Tensor  # of the batch's rows
    owners: Tensor  # of the bank's rows
    stochastic: bool
    loss_slack: Tensor
    grad_slack: Tensor
    rows_slack: float


def expect(logits: Tensor, index: Tensor, bank: reference.Bank, **options: Any) -> Expected:
    """What the definition makes, on the CPU, of a step with these :class:`StepOptions`; the bank stays as it is."""
    values: dict[str, Any] = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()
    }
    logits, index, before, slots = (tensor.detach().cpu() for tensor in (logits, index, bank.pseudo_logits, bank.slots))

    def copy(rows: Tensor, rounding: str) -> reference.Bank:
        return reference.Bank(
            rows, slots, bank.updates.cpu().clone(), bank.status, bank.label_scale, rounding, bank.seed
        )

    moved, rounded = copy(before.double(), "nearest"), copy(before.clone(), bank.rounding)  # float64 is not rounded
    log_p = logits.double().log_softmax(1)
    log_q = reference.log_pseudo_probs(reference.lookup(index, slots), moved)
    exact = reference.d2_step(logits, index, moved, **values)
    reference.d2_step(logits, index, rounded, **values)

    alpha, beta, label_lr, grad_scale, *_ = step = StepOptions(**values)
    divisor, update_divisor = step.normalizers(len(logits))
    # At least 8: also where all probabilities are alike, exp and log themselves are rounded.
    spread = 8.0 - torch.minimum(log_p.amin(1), log_q.amin(1)).nan_to_num()
    top = torch.maximum(log_p.amax(1), log_q.amax(1)).nan_to_num().exp()
    unit = _ROUNDINGS * torch.finfo(torch.float32).eps * float(alpha + beta) * spread
    written = slots[index.long()].long()[logits.isfinite().all(1)] if step.update else slots[:0].long()
    untouched = torch.ones_like(before[:, 0], dtype=torch.bool)
    untouched[written[written >= 0]] = False
    per_row = step.reduction == "none"
    return Expected(
        exact.row_losses if per_row else exact.loss[None],
        exact.grad,
        moved.pseudo_logits,
        rounded.pseudo_logits,
        moved.updates,
        before.clone(),
        untouched,
        index,
        (slots >= 0).nonzero()[:, 0],
        bank.rounding == "stochastic",
        loss_slack=(unit if per_row else unit.sum(0, True) / divisor)[:, None],
        grad_slack=(unit * top * float(grad_scale) / divisor)[:, None],
        rows_slack=max((unit * top).tolist(), default=0.0) * abs(float(label_lr)) / update_divisor,
    )


def compare(expected: Expected, loss: Tensor, grad: Tensor, bank: PseudoLabelBank) -> float:
    """The largest error of loss, gradient and bank over what is allowed, at most 1; Mismatch says where it is more."""
    worst = max(
        _compare("the loss", loss.reshape(-1, 1), expected.loss[:, None], expected.loss_slack, None),
        _compare("the gradient", grad, expected.grad, expected.grad_slack, expected.samples),
    )
    ours, nobody, owners = bank.pseudo_logits.cpu(), expected.untouched, expected.owners
    _compare("a row of no sample in the batch", ours[nobody], expected.before[nobody], None, owners[nobody])
    worst = max(worst, _compare("the bank", ours, expected.rows, expected.rows_slack, owners, expected.stochastic))
    if expected.stochastic:
        share = float((ours != expected.rounded_rows).double().mean())
        if share > max(_SAME_BITS, 3 / ours.numel()):
            raise Mismatch(
                f"{share:.2%} of the bank is rounded otherwise than the definition says (allowed: {_SAME_BITS:.1%})"
            )
    if int(bank.updates) != int(expected.updates):
        raise Mismatch(f"the bank counts {int(bank.updates)} updates instead of {int(expected.updates)}")
    return worst


def check_step(
    backend: str, logits: Tensor, index: Tensor, bank: PseudoLabelBank, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one :func:`r2d2fast.d2_step`; Mismatch where they or the bank are not what the definition says."""
    expected = expect(logits, index, bank, **options)
    loss, grad = d2_step(logits, index, bank, backend=backend, **options)
    compare(expected, loss, grad, bank)
    return loss, grad


def compare_rows(bank: PseudoLabelBank, expected: Tensor) -> None:
    """Mismatch where a bank's rows are not bitwise ``expected``."""
    _compare("the bank", bank.pseudo_logits, expected, None, (bank.slots >= 0).nonzero()[:, 0].cpu())


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` around float64 ``values``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** values.abs().clamp_min(info.smallest_normal).log2().floor()


def _compare(
    what: str,
    ours: Tensor,
    exact: Tensor,
    slack: Tensor | float | None,
    samples: Tensor | None,
    stochastic: bool = False,
) -> float:
    """The largest error ``[rows, columns]`` over what is allowed; with a slack of None nothing is."""
    if ours.shape != exact.shape:
        raise Mismatch(f"{what} has shape {list(ours.shape)} instead of {list(exact.shape)}")
    if not exact.numel():
        return 0.0
    actual, exact = ours.cpu().double(), exact.cpu().double()
    rounding = (1.01 if stochastic else 0.51) * _spacing(exact.nan_to_num(), ours.dtype)
    allowed = 0.0 if slack is None else rounding + slack
    error = ((actual - exact).abs() / allowed).nan_to_num(torch.inf)
    error = error.masked_fill((actual == exact) | (actual.isnan() & exact.isnan()), 0.0)
    worst = float(error.max())
    if worst > 1:
        wrong = error.amax(1) > 1
        row = int(wrong.nonzero()[0, 0])
        column = int(error[row].argmax())
        place = "" if samples is None else f", first differing row {row} (sample {int(samples[row])}), class {column}"
        size = "" if slack is None else f", {float(error[row, column]):.3g} times what rounding allows"
        count = "" if samples is None else f"; {int(wrong.sum())} of {len(wrong)} rows differ"
        raise Mismatch(
            f"{what} is wrong{place}: {float(actual[row, column]):.9g} instead of {float(exact[row, column]):.9g}{size}{count}"
        )
    return worst
