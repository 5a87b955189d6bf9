"""R2-D2: a bank of pseudo-logits, predicted anew again and again (R2) and learned with the network in between (D2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r2d2fast import FusedD2Loss
from r2d2fast.tables import counted
from r2d2fast.train.build import make_bank
from r2d2fast.train.errors import DIVERGED, DivergenceError
from r2d2fast.train.methods.alignment import Alignment
from r2d2fast.train.methods.early_stopping import EarlyStopping
from r2d2fast.train.methods.method import LossFunction, Method
from r2d2fast.train.methods.theorems import TheoremMetrics

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch
    from r2d2fast.train.trainer import Trainer


# Nodes of autograd, those of linear layers, that do not need the logits they made for their own backward: the gradient may
# overwrite them, one tensor of the batch's size less. Of other nodes one would find out in the middle of a run.
_NEED_NO_RESULT = ("AddmmBackward0", "MmBackward0")


class R2D2(Method):
    """Stage 2 is D2 with repredictions; stage 3 fine-tunes on the hard labels found.

    Attributes:
        bank: the pseudo-logits of this rank's unlabelled samples.
        early_stopping: of stage 2, where it has one, as long as that lasts; None otherwise.
    """

    stages = ((1, 2, 3), (1, 2), (1,), (2, 3), (2,))
    predicts = True
    capturable = True

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        config, ranks, classes = trainer.config, trainer.ranks, trainer.data.num_classes
        labels = trainer.ownership.bank_labels()
        self.bank = ranks.on_all(lambda: make_bank(config, labels, classes, ranks))
        self.alignment = Alignment(self.bank, ranks) if config.stage2.distribution_alignment else None
        self.d2_loss = FusedD2Loss(
            self.bank, config.alpha, config.beta, config.label_lr, class_loss=config.class_loss, statistics=True
        )
        assert self.d2_loss.statistics is not None
        self.statistics = self.d2_loss.statistics
        self.theorems = TheoremMetrics(self.bank, config.alpha, config.beta, config.class_loss)
        self.early_stopping: EarlyStopping | None = None

    def at_stage(self, stage: int | None) -> None:
        """See the base class."""
        trainer, limit = self.trainer, self.trainer.config.stage2.labelled_error_limit
        if stage != 2:
            self.early_stopping = None
        elif limit is not None and self.early_stopping is None:
            self.early_stopping = EarlyStopping(trainer.model, limit, len(trainer.labelled))

    # ------------------------------------------------------------------------------------------- R2

    def before_epoch(self, epoch: Epoch) -> None:
        """(Re)prediction, where the schedule has one."""
        if not epoch.predicts:
            return
        trainer = self.trainer
        self.predict()
        if epoch.epoch == 0 and self.early_stopping is not None:
            self.early_stopping.first_error = self._labelled_error()
            confidence = trainer.ownership.confidence(self.bank)[trainer.unlabelled.to(trainer.ranks.device)]
            self.early_stopping.expected_error = 100 * (1 - confidence.mean().item())
        trainer.callback.predicted(trainer)

    def predict(self) -> None:
        """Give every unlabelled sample the network's own logits as pseudo-logits: eval mode, no augmentation, aligned where the
        configuration says so.

        The samples are dealt to the ranks anew, each of which predicts its own.
        """
        trainer, ownership = self.trainer, self.trainer.ownership
        ownership.deal(trainer.last_prediction())
        finite = True
        for index, logits in trainer.evaluator.logits(trainer.data.train, ownership.samples):
            if torch.isfinite(logits).all():
                self.bank.predict_(ownership.local[index.to(trainer.ranks.device)], logits)
            else:  # on to the end, where all ranks hear of it
                finite = False
        if trainer.ranks.any(not finite):
            done = counted(trainer.position.epoch, "epoch")
            raise DivergenceError(f"predicted logits are not finite after {done}; {DIVERGED}")
        if self.alignment is not None and trainer.schedule[trainer.position.epoch].stage == 2:
            self.alignment.align_()
        self.theorems.predicted()

    def stops(self, epoch: Epoch) -> bool:
        """Whether stage 2 ends here, before the next prediction or at its last epoch, because it harms; then with the bank that
        the network which is kept predicts."""
        trainer = self.trainer
        if self.early_stopping is None:
            return False
        if not epoch.last and not trainer.schedule[trainer.position.epoch + 1].predicts:
            return False
        stopped = self.early_stopping.stop(self._labelled_error(), trainer.evaluator.model)
        if stopped:
            self.predict()
        return stopped

    def _labelled_error(self) -> float:
        """Error in percent on the labelled samples, as evaluation sees them; every rank calls this."""
        trainer, ranks = self.trainer, self.trainer.ranks
        wrong = torch.zeros((), dtype=torch.int64, device=ranks.device)
        own = trainer.labelled[ranks.part(len(trainer.labelled))]
        for index, logits in trainer.evaluator.logits(trainer.data.train, own):
            wrong += (logits.argmax(1) != trainer.labels[index].to(wrong.device)).sum()
        return 100 * ranks.sum_(wrong).item() / len(trainer.labelled)

    # ------------------------------------------------------------------------------------------- D2

    def loss_function(self, epoch: Epoch) -> LossFunction:
        """D2 in stage 2; in stage 3 cross entropy with the hard labels."""
        return self._d2 if epoch.stage == 2 else self.cross_entropy(self.hard_labels())

    def _d2(self, logits: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
        trainer = self.trainer
        self.d2_loss.normalizer = total / trainer.ranks.count
        self.d2_loss.update_normalizer = float(total)
        local = trainer.ownership.local.index_select(0, index)
        measures = trainer.position.step == len(trainer.losses) - 1
        out = logits if not measures and type(logits.grad_fn).__name__ in _NEED_NO_RESULT else None
        loss, grad = self.d2_loss.step(logits, local, trainer.precision.scale(), out)
        if measures:
            self.theorems.measure(logits, local)
        return loss, grad

    def hard_labels(self) -> Tensor:
        """Those given, and argmax of the pseudo-label."""
        return self.trainer.ownership.hard_labels(self.bank)

    def pseudo_labels(self) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return self.hard_labels(), self.trainer.ownership.confidence(self.bank)

    def metrics(self, epoch: Epoch) -> dict[str, Any]:
        """See the base class."""
        if epoch.stage != 2:
            return {}
        self.trainer.ranks.sum_(self.statistics)
        return self.d2_loss.read_statistics() | self.theorems.read(self.trainer.ranks)

    # ------------------------------------------------------------------------------------------- state

    def memory(self) -> list[str]:
        """See the base class."""
        size = f"{len(self.trainer.unlabelled)} x {self.trainer.data.num_classes}"
        return [f"Bank: {size} pseudo-logits, {self.bank.nbytes} bytes on this rank."]

    def tensors(self) -> dict[str, Any]:
        """The bank's rows in the order of the partition, their sums, and the network that early stopping keeps."""
        trainer, rows = self.trainer, self.bank.pseudo_logits
        if self.bank.host_rows is not None:
            # As a GPU's tensor they would be copied on the GPU first, since they have gaps, and it may be smaller than the bank.
            rows = self.bank.host_rows
            torch.cuda.synchronize()
        unlabelled = len(trainer.unlabelled)
        return {
            "kept": {} if self.early_stopping is None else self.early_stopping.kept,
            "bank": trainer.ranks.shard(rows, (unlabelled, trainer.data.num_classes)),
            "bank_sums": trainer.ranks.shard(self.theorems.sums, (unlabelled, 1)),
        }

    def values(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "statistics": self.trainer.ranks.gather(self.statistics).tolist(),
            "theorems": self.trainer.ranks.gather(self.theorems.measured).tolist(),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.values(),
            "class_shares": None if self.alignment is None else self.alignment.values(),
            "updates": int(self.bank.updates),
        }

    def load_values(self, values: dict[str, Any]) -> None:
        """See the base class."""
        for name, sums in (("statistics", self.statistics), ("theorems", self.theorems.measured)):
            sums.copy_(self.trainer.ranks.ungather(values[name]))
        self.bank.updates.fill_(values["updates"])
        if self.early_stopping is not None:
            self.early_stopping.load_values(values["early_stopping"])
        if self.alignment is not None:
            self.alignment.load_values(values["class_shares"])
