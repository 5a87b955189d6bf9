"""Distribution alignment: predictions that keep the shares of the classes."""

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank
from r2d2fast.train.ranks import Ranks

# The shift of a class changes the shares of the others, too; three rounds take away nine tenths of a large difference.
_ROUNDS = 3
# Rows that are turned into probabilities at a time: of the whole bank they would take as much memory as it does.
_ROWS = 4096


class Alignment:
    """Shifts predicted logits so that the mean prediction over all unlabelled samples stays what it was the first time.

    In stage 2 a network learns from its own predictions, by which a class that it predicts somewhat too often grows from one
    reprediction to the next: on CIFAR-10 embeddings with 40 labels the test error falls up to epoch 8 of 20 and then rises again.
    ReMixMatch (Berthelot et al., ICLR 2020) aligns with the shares of the labels, which harms where these were chosen evenly
    among classes of uneven size; stage 1's own mean prediction assumes nothing.

    Args:
        bank: of this rank.
        ranks: the processes of the run.
    """

    def __init__(self, bank: PseudoLabelBank, ranks: Ranks) -> None:
        self.bank = bank
        self.ranks = ranks
        self.shares: Tensor | None = None

    def align_(self) -> None:
        """Shift the bank's rows, which have just been predicted; the first time, take their shares. Every rank calls this."""
        if self.shares is None:
            self.shares = self._shares(torch.zeros(self.bank.num_classes, device=self.bank.device))
            return
        shift = torch.zeros_like(self.shares)
        for _ in range(_ROUNDS):
            shift += (self.shares / self._shares(shift)).log()
        for rows in self.bank.pseudo_logits.split(_ROWS):
            rows += shift

    def _shares(self, shift: Tensor) -> Tensor:
        """The mean over the rows of all ranks of softmax(row + ``shift``), float32 ``[N]``, each at least 10⁻⁶."""
        total = torch.zeros(self.bank.num_classes + 1, dtype=torch.float64, device=self.bank.device)
        for rows in self.bank.pseudo_logits.split(_ROWS):
            total[:-1] += (rows.float() + shift).softmax(1).sum(0)
            total[-1] += len(rows)
        self.ranks.sum_(total)
        return (total[:-1] / total[-1]).clamp_min(1e-6).float()

    def values(self) -> list[float] | None:
        """What a checkpoint has to hold."""
        return None if self.shares is None else self.shares.tolist()

    def load_values(self, shares: list[float] | None) -> None:
        """Take over what :meth:`values` gave."""
        self.shares = None if shares is None else torch.tensor(shares, device=self.bank.device)
