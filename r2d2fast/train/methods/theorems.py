"""What the paper proves of D2, measured while it trains: Theorems 1 and 2, and Equation 13."""

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank
from r2d2fast.train.ranks import Ranks

# Elements of a bank that are added up at a time, 2 MiB in float64: in a cache they take half the time, and the whole of the bank
# would take more memory than itself.
_ELEMENTS = 2**18


class TheoremMetrics:
    """Measures on one batch an epoch, and the whole bank's sums, how far theory and training agree. No host waits for a device
    but in :meth:`read`.

    Theorem 1: where training has converged, p̃_n = exp(−L/α) p̂_n^(1 − β/α) for the class n of the largest prediction, with the
    sample's own loss L = αL_c + βL_e; it is about the class loss KL(p̂‖p̃) only. Theorem 2: then p̃_n ≤ p̂_n, pseudo-labels are
    flatter than predictions. Eq. 13: no update changes Σ_j ỹ_j.

    Args:
        bank: of this rank.
        alpha, beta, class_loss: of the loss.

    Attributes:
        sums: float64 ``[U, 1]``, Σ_j ỹ_j of each row at the last prediction. State of the run, as the bank's rows are.
        measured: float64 ``[3]``, of the batches measured since the last :meth:`read`: unlabelled rows, sum of their gaps to
            Theorem 1, rows for which p̃_n ≤ p̂_n. State of the run.
    """

    def __init__(self, bank: PseudoLabelBank, alpha: float, beta: float, class_loss: str) -> None:
        self.bank = bank
        self.alpha = alpha
        self.beta = beta
        self.has_theorem1 = class_loss == "kl_reverse" and alpha > 0
        self.sums = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.float64, device=bank.device)
        self.measured = torch.zeros(3, dtype=torch.float64, device=bank.device)

    def predicted(self) -> None:
        """All rows have just been predicted: from here the sums are to stay as they are."""
        self.sums.copy_(self._sums())

    @torch.no_grad()
    def measure(self, logits: Tensor, index: Tensor) -> None:
        """Add a batch: ``logits`` ``[B, N]``, any float dtype, and sample numbers of the bank ``[B]``, unlabelled or not."""
        slots = self.bank.slots[index].long()
        unlabelled = slots >= 0
        log_p = logits.double().log_softmax(1)
        log_q = self.bank.pseudo_logits[slots.clamp(min=0)].double().log_softmax(1)
        log_p_n, n = log_p.max(1)
        log_q_n = log_q.gather(1, n[:, None])[:, 0]
        gaps = torch.zeros_like(log_p_n)
        if self.has_theorem1:
            p = log_p.exp()
            loss = self.alpha * (p * (log_p - log_q)).sum(1) - self.beta * (p * log_p).sum(1)
            theorem = (-loss / self.alpha + (1 - self.beta / self.alpha) * log_p_n).exp()
            gaps = (log_q_n.exp() - theorem).abs()
        flatter = log_q_n <= log_p_n
        self.measured += torch.stack([unlabelled.sum(), (gaps * unlabelled).sum(), (flatter & unlabelled).sum()])

    def read(self, ranks: Ranks) -> dict[str, float | None]:
        """Means over the unlabelled rows measured since the last call, of all ranks; every rank calls this, once an epoch.

        ``theorem1_gap``: of |p̃_n − exp(−L/α) p̂_n^(1 − β/α)|, 0 … 1 and more; None for other class losses. ``theorem2_share``: the
        share of samples with p̃_n ≤ p̂_n, 0 … 1. Both None if no batch was measured. ``sum_drift``: mean of |Σ_j ỹ_j − that at the
        last prediction| over all rows of the banks.
        """
        drift = (self._sums() - self.sums).abs().sum()
        total = torch.stack([*self.measured, drift, torch.full_like(drift, len(self.sums))])
        self.measured.zero_()
        rows, gaps, flatter, drifts, bank_rows = ranks.sum_(total).tolist()
        return {
            "theorem1_gap": gaps / rows if rows and self.has_theorem1 else None,
            "theorem2_share": flatter / rows if rows else None,
            "sum_drift": drifts / max(bank_rows, 1.0),
        }

    def _sums(self) -> Tensor:
        rows = self.bank.pseudo_logits
        size = max(_ELEMENTS // rows.shape[1], 1)
        sums = torch.empty(len(rows), 1, dtype=torch.float64, device=rows.device)
        # One scratch for all pieces: freed and allocated for each, between sums that stay, they came to take as much memory as a
        # float64 copy of the bank (glibc, 262 144 x 1000, now and then).
        scratch = torch.empty(min(size, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
        for piece, sums_of_piece in zip(rows.split(size), sums.split(size), strict=True):
            torch.sum(scratch[: len(piece)].copy_(piece), 1, keepdim=True, out=sums_of_piece)
        return sums
