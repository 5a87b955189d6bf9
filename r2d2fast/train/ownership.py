"""What the partition of the samples among the ranks of a run says of all samples."""

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank
from r2d2fast.data import BatchSampler, Partition
from r2d2fast.train.ranks import Ranks

# Rows of a bank that are turned into probabilities at a time: of the whole bank they would take as much memory as it does.
_ROWS = 512


class Ownership(Partition):
    """The partition of a run.

    Args:
        labels: int64 ``[M]``, on the CPU; −1 for an unlabelled sample.
        sampler: with the labelled and unlabelled samples of the run; it deals the latter.
        ranks: the processes of the run.
    """

    def __init__(self, labels: Tensor, sampler: BatchSampler, ranks: Ranks) -> None:
        self.ranks = ranks
        super().__init__(labels, sampler, ranks.device)

    def confidence(self, bank: PseudoLabelBank) -> Tensor:
        """float32 ``[M]``, the same on every rank: the largest probability of the pseudo-label, 1 for a labelled sample."""
        confidence = torch.zeros(len(self.labels), device=self.ranks.device)
        own = self.samples.to(confidence.device)
        for samples, rows in zip(own.split(_ROWS), bank.pseudo_logits.split(_ROWS), strict=True):
            confidence[samples] = rows.to(confidence.device).float().softmax(1).amax(1)
        return self._with_labelled(confidence, 1.0)

    def _sum_(self, values: Tensor) -> None:
        self.ranks.sum_(values)
