"""One backend's step against the definition in float64, in units of the error that rounding allows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank, d2_step, reference
from r2d2fast.doctor.cases import LABEL_LR, Case

ALPHA, BETA = 0.1, 0.03
_CPU = torch.device("cpu")
_ROUNDINGS = 4.0
"""How many float32 roundings of a row's largest log-probability its arithmetic may add up to."""
_SAME_BITS = 0.005
"""Stochastic rounding: the share of elements whose float32 value may fall on the other side of its random threshold."""


class Wrong(Exception):
    """A backend's result is not what it must be; the message says where."""


@dataclass(frozen=True)
class Exact:
    """The definition's results for a case, and how far float32 arithmetic may be off in each row, before the result is
    rounded to its dtype: some roundings of the largest log-probability of p̂ and p̃, weighed with the largest probability."""

    loss: Tensor
    grad: Tensor
    rows: Tensor  # of the bank after the step, not rounded
    rounded_rows: Tensor
    before: Tensor
    untouched: Tensor  # rows that are nobody's in this step
    samples: Tensor  # of the batch's rows
    owners: Tensor  # of the bank's rows
    loss_slack: Tensor
    grad_slack: Tensor
    rows_slack: float


def settle(case: Case) -> Exact:
    logits, index = case.batch_on(_CPU)
    bank, rounded = case.bank(_CPU), case.bank(_CPU)
    before = bank.pseudo_logits
    slots = bank.slots[index].long()
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[slots[(slots >= 0) & logits.isfinite().all(1) & case.update]] = False
    log_p, log_q = logits.double().log_softmax(1), reference.log_pseudo_probs(slots, bank)
    # At least 8: also where all probabilities are alike, exp and log themselves are rounded.
    spread = 8.0 - torch.minimum(log_p.amin(1), log_q.amin(1)).nan_to_num()
    top = torch.maximum(log_p.amax(1), log_q.amax(1)).nan_to_num().exp()
    unit = _ROUNDINGS * torch.finfo(torch.float32).eps * (ALPHA + BETA) * spread
    bank.pseudo_logits, bank.rounding = before.double(), "nearest"  # float64 is not rounded
    exact = reference.d2_step(logits, index, bank, update=case.update, **_options(case))
    reference.d2_step(logits, index, rounded, update=case.update, **_options(case))
    return Exact(
        exact.loss,
        exact.grad,
        bank.pseudo_logits,
        rounded.pseudo_logits,
        before,
        untouched,
        index,
        (bank.slots >= 0).nonzero()[:, 0],
        loss_slack=unit.sum() / case.batch,
        grad_slack=(unit * top / case.batch)[:, None],
        rows_slack=float((unit * top).max()) * LABEL_LR,
    )


def judge(case: Case, exact: Exact, backend: str, device: torch.device) -> float:
    """The largest error of loss, gradient and bank over what is allowed, at most 1; Wrong says where it is more."""
    bank = case.bank(device)
    loss, grad = d2_step(*case.batch_on(device), bank, update=case.update, backend=backend, **_options(case, device))
    worst = max(
        _compare("the loss", loss[None, None], exact.loss[None, None], exact.loss_slack, None),
        _compare("the gradient", grad, exact.grad, exact.grad_slack, exact.samples),
    )
    ours, nobody = bank.pseudo_logits.cpu(), exact.untouched
    _compare("a row of no sample in the batch", ours[nobody], exact.before[nobody], None, exact.owners[nobody])
    stochastic = case.rounding == "stochastic"
    worst = max(worst, _compare("the bank", ours, exact.rows, exact.rows_slack, exact.owners, stochastic))
    if stochastic:
        share = float((ours != exact.rounded_rows).double().mean())
        if share > max(_SAME_BITS, 3 / ours.numel()):
            raise Wrong(
                f"{share:.2%} of the bank is rounded otherwise than the definition says (allowed: {_SAME_BITS:.1%})"
            )
    if int(bank.step) != case.update:
        raise Wrong(f"the bank counts {int(bank.step)} steps after {int(case.update)}")
    return worst


def same_bits(case: Case, backend: str, device: torch.device, runs: int = 5) -> None:
    """Wrong unless every run of a step gives the same loss, gradient and bank, bit by bit."""

    def run() -> tuple[Tensor, ...]:
        bank = case.bank(device)
        return (*d2_step(*case.batch_on(device), bank, backend=backend, **_options(case)), bank.pseudo_logits)

    first = run()
    for _ in range(runs - 1):
        for name, ours, before in zip(("loss", "gradient", "bank"), run(), first, strict=True):
            if not torch.equal(ours, before):
                raise Wrong(f"the {name} of equal steps differs from run to run")


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` around float64 ``values``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** values.abs().clamp_min(info.smallest_normal).log2().floor()


def compare_bank(bank: PseudoLabelBank, expected: Tensor) -> None:
    """Wrong where a bank's rows are not bitwise ``expected``."""
    _compare("the bank", bank.pseudo_logits, expected, None, (bank.slots >= 0).nonzero()[:, 0].cpu())


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
        raise Wrong(f"{what} has shape {list(ours.shape)} instead of {list(exact.shape)}")
    if not exact.numel():
        return 0.0
    actual, exact = ours.cpu().double(), exact.cpu().double()
    rounding = (1.01 if stochastic else 0.51) * spacing(exact.nan_to_num(), ours.dtype)
    allowed = torch.zeros(()) if slack is None else rounding + slack
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
        raise Wrong(
            f"{what} is wrong{place}: {float(actual[row, column]):.9g} instead of {float(exact[row, column]):.9g}{size}{count}"
        )
    return worst


def _options(case: Case, device: torch.device | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "label_lr": LABEL_LR}
    if case.kind == "scalars in tensors" and device is not None:
        values = {name: torch.tensor(value, device=device) for name, value in values.items()}
    return {**values, "class_loss": case.class_loss, "update_normalizer": 1.0}
