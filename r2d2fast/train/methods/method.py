"""What the training loop asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast.data import Augmentation, Batch, Embeddings, Images, ResidentImages, derive_seed
from r2d2fast.data.order import keys_of

if TYPE_CHECKING:
    from r2d2fast.train.config import Config
    from r2d2fast.train.schedule import Epoch
    from r2d2fast.train.trainer import Trainer

# Of logits [B, N] as the network gives them, sample numbers [B] and the size of the global batch: the loss, and its gradient
# times the precision's scale, which may lie where the logits were.
LossFunction = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Method:
    """What a run does with unlabelled samples. A method writes :meth:`loss`, or :meth:`loss_function`; the other answers below
    are those of one that keeps nothing and looks at each sample once.

    A batch of stage 2 has unlabelled samples first, then labelled ones, so many on each rank (``unlabelled``, ``labelled``).

    Args:
        trainer: of this rank, whole but for its method. A method reads from it whatever it needs.
    """

    stages: ClassVar[tuple[tuple[int, ...], ...]] = ((2,), (1, 2))
    """The accepted ``--stages``, the recipe's own first; the others start from the network of stage 1."""
    predicts: ClassVar[bool] = False
    """Whether the network predicts all unlabelled samples at the beginning of stages 2 and 3, and of phases of stage 2."""
    passes: ClassVar[int] = 1
    """How often a step of stage 2 trains on each unlabelled sample of the batch."""
    second_view: ClassVar[bool] = False
    """Whether a step of stage 2 takes a second view of each unlabelled sample, augmented by other random numbers."""
    capturable: ClassVar[bool] = False
    """Whether the steps between two predictions differ in nothing but their batch, the learning rate and their share in the
    averaged weights (``--cuda-graphs``)."""
    labelled_share: ClassVar[float] = 0.25
    """The labelled samples' share of a batch of stage 2."""
    recipe: ClassVar[dict[str, tuple[Any, str]]] = {}
    """What the method's authors set, (value, source) by the name of the flag, in place of the data set's own recipe."""
    recipes: ClassVar[dict[str, dict[str, tuple[Any, str]]]] = {}
    """The same for one data set, by its name."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        two, count = trainer.config.stage2, trainer.ranks.count
        self.unlabelled, self.labelled = two.unlabelled_batch // count, two.labelled_batch // count
        self.labels = trainer.labels.to(trainer.ranks.device)

    @staticmethod
    def check(config: Config, images: Images) -> None:
        """Raise ConfigError for what the method cannot learn with."""

    # ------------------------------------------------------------------------------------------- a step

    def views(self, batches: list[Batch], augmentation: Augmentation, epoch: Epoch) -> Iterator[tuple[Tensor, ...]]:
        """The images of each batch of an epoch, and in stage 2, where the method takes one, the second view."""
        images, seed = self.trainer.data.train, self.trainer.config.seed
        first = images.batches(batches, augmentation, seed)
        if not self.second_view or epoch.stage != 2:
            return zip(first)
        unlabelled = slice(self.unlabelled)
        again = [Batch(one.samples[unlabelled], keys_of(one)[unlabelled], one.global_size) for one in batches]
        other = self.second_augmentation(augmentation)
        return zip(first, images.batches(again, other, derive_seed(seed, 1)), strict=True)

    def views_on_device(
        self, augmentation: Augmentation, epoch: Epoch
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None:
        """The same views as a function of a batch's samples and their keys, both int64 ``[B]`` on the device, which makes them
        without the host; None where that cannot be."""
        images = self.trainer.data.train
        if not isinstance(images, (ResidentImages, Embeddings)) or (self.second_view and epoch.stage == 2):
            return None
        make = images.on_device(augmentation, self.trainer.config.seed) if not augmentation.randaugment else None
        return None if make is None else lambda samples, keys: (make(samples, keys),)

    def second_augmentation(self, augmentation: Augmentation) -> Augmentation:
        """That of the second view, where the first has ``augmentation``."""
        return augmentation

    def forward(self, views: tuple[Tensor, ...]) -> Tensor:
        """The logits that the loss is of, ``[B', N]``, in training: those of the batch first, then whatever the method adds.

        ``trainer.network`` may be called several times; ``trainer.model`` is the same network, for passes without a gradient of
        its weights.
        """
        return self.trainer.network(views[0])

    def param_group(self, lr: float, progress: float) -> dict[str, Any]:
        """Settings of the optimizer for a step: ``lr`` is the schedule's, ``progress`` the share of the stage that is done."""
        return {"lr": lr}

    def loss_function(self, epoch: Epoch) -> LossFunction:
        """The loss of the steps that follow. Each rank divides by its share of the global batch, as gradients are averaged over
        ranks."""
        return self.by_autograd(self.loss)

    def loss(self, logits: Tensor, index: Tensor, total: int) -> Tensor:
        """The loss of a step: a scalar, of float32 ``logits`` as :meth:`forward` gives them, the samples ``index`` ``[B]`` of
        this rank, and the size of the global batch."""
        raise NotImplementedError

    def by_autograd(self, loss: Callable[[Tensor, Tensor, int], Tensor]) -> LossFunction:
        """``loss`` with its gradient."""

        def loss_function(logits: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
            leaf = logits.detach().requires_grad_()
            value = loss(leaf.float(), index, total)
            (grad,) = torch.autograd.grad(value * self.trainer.precision.scale(), leaf)
            return value.detach(), grad

        return loss_function

    def cross_entropy(self, targets: Tensor) -> LossFunction:
        """The mean cross entropy with the classes ``targets``, int64 ``[M]``."""
        ranks = self.trainer.ranks.count
        return self.by_autograd(
            lambda logits, index, total: F.cross_entropy(logits, targets[index], reduction="sum") * (ranks / total)
        )

    def labelled_loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """The mean cross entropy of the labelled samples in a batch of stage 2."""
        batch = slice(self.unlabelled, self.unlabelled + self.labelled)
        return F.cross_entropy(logits[batch], self.labels[index[batch]])

    # ------------------------------------------------------------------------------------------- an epoch

    def at_stage(self, stage: int | None) -> None:
        """The run has come to an epoch of ``stage``, trained or resumed; None at its end."""

    def before_epoch(self, epoch: Epoch) -> None:
        """Called before the first step of an epoch."""

    def stops(self, epoch: Epoch) -> bool:
        """Whether the stage ends with ``epoch``, whose steps are done, though the schedule has more of it."""
        return False

    def hard_labels(self) -> Tensor | None:
        """int64 ``[M]``, the same on every rank: the class of every sample; None where the method keeps none."""
        return None

    def pseudo_labels(self) -> tuple[Tensor, Tensor] | None:
        """The hard labels, and float32 ``[M]`` the probability of each; None where the method keeps none."""
        return None

    def metrics(self, epoch: Epoch) -> dict[str, Any]:
        """Metrics of an epoch whose steps are done; every rank calls this."""
        return {}

    # ------------------------------------------------------------------------------------------- state

    def memory(self) -> list[str]:
        """Sentences that say what it keeps, for ``--dry-run``."""
        return []

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint has to hold, tensors that share memory with the method's own; those of rows as ``Ranks.shard``
        gives them."""
        return {}

    def values(self) -> dict[str, Any]:
        """The rest of it, as plain values for JSON; every rank calls this."""
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`values` gave, perhaps on another number of ranks; the tensors follow."""
