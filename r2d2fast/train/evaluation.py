"""What the network says of images as they are: its logits, from which predictions and test errors are made."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from r2d2fast.data import Dataset, Images, consecutive_batches
from r2d2fast.train.errors import DIVERGED, DivergenceError
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks

EVALUATION_BATCH = 512
# With so many classes the paper gives the top-5 error, too.
CLASSES_FOR_TOP5 = 200


class Evaluator:
    """A network in eval mode, without augmentation, on all ranks.

    Args:
        model: the network, not wrapped in DistributedDataParallel.
        precision: of its arithmetic.
        ranks: each of which evaluates samples of its own.
        between_batches: called after each batch; if it raises, the evaluation can be made anew.
    """

    def __init__(
        self, model: nn.Module, precision: Precision, ranks: Ranks, between_batches: Callable[[], None]
    ) -> None:
        self.model = model
        self.precision = precision
        self.ranks = ranks
        self.between_batches = between_batches

    @torch.no_grad()
    def logits(self, images: Images, samples: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch the numbers ``[b]`` of ``samples`` (int64 ``[n]``, on the CPU) and their logits, float32 ``[b, N]``.

        Every rank calls this, with samples of its own, perhaps none, and goes through all batches.
        """
        self.ranks.broadcast_buffers(self.model)
        self.model.eval()
        batches = consecutive_batches(samples, EVALUATION_BATCH)
        # Ranks have different numbers of batches, but only in what all of them do between batches they can agree.
        common = self.ranks.minimum(len(batches))
        for number, (batch, pixels) in enumerate(zip(batches, images.batches(batches, None, 0), strict=True)):
            with self.precision.autocast():
                logits = self.model(pixels)
            yield batch.samples, logits.float()
            if number < common:
                self.between_batches()

    def test_errors(self, dataset: Dataset) -> dict[str, float | None]:
        """``test_error`` on the test images, in percent; with many classes ``test_error_top5``, too. Every rank calls this.

        None where there are no test images. Raises DivergenceError, on every rank, where logits are not finite.
        """
        device = self.ranks.device
        kinds = {"test_error": 1} | ({"test_error_top5": 5} if dataset.num_classes >= CLASSES_FOR_TOP5 else {})
        if len(dataset.test) == 0:
            return dict.fromkeys(kinds)
        part = self.ranks.part(len(dataset.test))
        right = torch.zeros(len(kinds) + 1, dtype=torch.int64, device=device)  # the last: logits that are not finite
        for index, logits in self.logits(dataset.test, torch.arange(part.start, part.stop)):
            labels = dataset.test_labels[index].to(device)
            hits = logits.topk(max(kinds.values())).indices == labels[:, None]
            right += torch.stack([*(hits[:, :k].sum() for k in kinds.values()), (~torch.isfinite(logits)).sum()])
        *counts, not_finite = self.ranks.sum_(right).tolist()
        if not_finite:
            raise DivergenceError(f"the network's logits are not finite; {DIVERGED}")
        total = len(dataset.test)
        return {kind: 100 * (total - count) / total for kind, count in zip(kinds, counts, strict=True)}


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits ``[B, N]`` the class, int64 ``[B]``, that test errors are counted with, and its probability, float32 ``[B]``."""
    # Not the largest probability: softmax can round two to the same number.
    classes = logits.topk(1).indices
    return classes[:, 0], logits.softmax(1).gather(1, classes)[:, 0]


def pseudo_label_error(hard_labels: Tensor, unlabelled: Tensor, true_labels: Tensor) -> float | None:
    """Error in percent of the ``unlabelled`` samples' hard labels, where the true ones are known; None where none is.

    ``hard_labels``: int64 ``[M]``; ``unlabelled``: int64 ``[U]``; ``true_labels``: int64 ``[M]``, on the CPU, −1 where unknown.
    """
    known = unlabelled[true_labels[unlabelled] >= 0]
    if len(known) == 0:
        return None
    return 100 * (hard_labels.cpu() != true_labels)[known].double().mean().item()
