"""Which samples each rank owns the pseudo-logits of, and what follows for labels and confidences of all samples."""

import torch
from torch import Tensor

from r2d2fast import PseudoLabelBank
from r2d2fast.data import BatchSampler
from r2d2fast.train.ranks import Ranks

# Rows of a bank that are turned into probabilities at a time: of the whole bank they would take as much memory as it does.
_ROWS = 512


class Ownership:
    """The unlabelled samples are dealt to the ranks, anew at each prediction; a rank owns the bank's rows of its own ones.

    To its bank a sample is known by a local number: the unlabelled ones of this rank first, in the order of the rows, then all
    labelled ones.

    Args:
        labels: int64 ``[M]``, on the CPU; −1 for an unlabelled sample.
        sampler: with the labelled and unlabelled samples of the run; it deals the latter.
        ranks: the processes of the run.

    Attributes:
        samples: int64 ``[R]``, on the CPU: row i of this rank's bank is that of sample ``samples[i]``.
        local: int64 ``[M]``, on the device: the local number of each sample, −1 for one that another rank owns.
    """

    samples: Tensor
    local: Tensor

    def __init__(self, labels: Tensor, sampler: BatchSampler, ranks: Ranks) -> None:
        self.labels = labels
        self.sampler = sampler
        self.ranks = ranks
        self.deal(0)

    def deal(self, prediction: int) -> None:
        """Deal the samples as from the prediction with this number on: that of the epoch which begins with it."""
        self.samples = self.sampler.partition(prediction)[self.ranks.rank]
        numbered = torch.cat([self.samples, self.sampler.labelled])
        local = torch.full((len(self.labels),), -1)
        local[numbered] = torch.arange(len(numbered))
        self.local = local.to(self.ranks.device)

    def bank_labels(self) -> Tensor:
        """int64 ``[R + L]``, on the CPU: the labels by local number, as this rank's bank is made of them."""
        return self.labels[torch.cat([self.samples, self.sampler.labelled])]

    def hard_labels(self, bank: PseudoLabelBank) -> Tensor:
        """int64 ``[M]``, the same on every rank: ground truth where there is any, argmax of the pseudo-label elsewhere.

        ``bank``: this rank's.
        """
        labels = torch.zeros(len(self.labels), dtype=torch.int64, device=self.ranks.device)
        labels[self.samples.to(labels.device)] = bank.pseudo_logits.argmax(1)
        return self._with_labelled(labels, self.labels[self.sampler.labelled].to(labels.device))

    def confidence(self, bank: PseudoLabelBank) -> Tensor:
        """float32 ``[M]``, the same on every rank: the largest probability of the pseudo-label, 1 for a labelled sample."""
        confidence = torch.zeros(len(self.labels), device=self.ranks.device)
        own = self.samples.to(confidence.device)
        for samples, rows in zip(own.split(_ROWS), bank.pseudo_logits.split(_ROWS), strict=True):
            confidence[samples] = rows.to(confidence.device).float().softmax(1).amax(1)
        return self._with_labelled(confidence, 1.0)

    def _with_labelled(self, values: Tensor, of_labelled: Tensor | float) -> Tensor:
        """Of all ranks: ``values`` of the unlabelled samples, zero where they are not this rank's, and those of labelled ones."""
        self.ranks.sum_(values)
        values[self.sampler.labelled.to(values.device)] = of_labelled
        return values
