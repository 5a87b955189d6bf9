"""Temporal ensembling (Laine & Aila, ICLR 2017): a sample should be predicted as it was on average in the epochs before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r2d2fast.train.methods.pi_model import LAINE, RECIPE, RECIPES, PiModel

if TYPE_CHECKING:
    from r2d2fast.train.trainer import Trainer

DECAY = 0.6


class TemporalEnsembling(PiModel):
    """loss = Σ CE(labelled) / B + w(t) · w_max · L / B · mean (p − t)², over unlabelled samples and classes.

    t = Z / (1 − 0.6ᵉ), with Z ← 0.6 Z + 0.4 p whenever the sample is seen, e times until now; a sample that has not been seen
    before has no t, and no part in the mean square. The authors keep Z of labelled samples, too, which here have their labels.

    Attributes:
        ensemble: float32 ``[R, N]``, Z of this rank's unlabelled samples.
        seen: float32 ``[R, 1]``, e of each.
    """

    passes = 1
    second_view = False
    recipe = RECIPE | {"unlabelled.weight": (30.0, LAINE)}
    recipes = RECIPES | {"cifar100": RECIPES["cifar100"] | {"unlabelled.weight": (100.0, LAINE)}}

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        rows, device = len(trainer.ownership.samples), trainer.ranks.device
        self.ensemble = torch.zeros(rows, trainer.data.num_classes, device=device)
        self.seen = torch.zeros(rows, 1, device=device)

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """See the class."""
        rows = self.trainer.ownership.local[index[: self.unlabelled]]
        predicted, past, seen = logits[: self.unlabelled].softmax(1), self.ensemble[rows], self.seen[rows]
        with torch.no_grad():
            self.ensemble[rows] = DECAY * past + (1 - DECAY) * predicted
            self.seen[rows] = seen + 1
        target = past / (1 - DECAY**seen).clamp_min(1 - DECAY)
        distance = ((predicted - target).square() * (seen > 0)).mean()
        return self.with_consistency(logits, index, distance)

    def memory(self) -> list[str]:
        """See the base class."""
        return [f"Averages: {' x '.join(map(str, self.ensemble.shape))} probabilities, {self.ensemble.nbytes} bytes."]

    def tensors(self) -> dict[str, Any]:
        """See the base class."""
        shard, (_, classes), samples = self.trainer.ranks.shard, self.ensemble.shape, len(self.trainer.unlabelled)
        return {"ensemble": shard(self.ensemble, (samples, classes)), "seen": shard(self.seen, (samples, 1))}
