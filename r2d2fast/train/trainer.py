"""The training loop: one for all three stages, which differ in data, targets and two switches."""

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from r2d2fast import FusedD2Loss
from r2d2fast.data import Augmentation, Batches, Dataset, Images, fold
from r2d2fast.train.checks import check_schedule, check_values
from r2d2fast.train.config import Config
from r2d2fast.train.errors import DivergenceError
from r2d2fast.train.parts import make_bank, make_network, make_optimizer
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.schedule import Epoch, make_schedule
from r2d2fast.train.stopwatch import Stopwatch
from r2d2fast.train.theorems import TheoremMetrics

EVALUATION_BATCH = 512
# With so many classes the paper gives the top-5 error, too.
CLASSES_FOR_TOP5 = 200

# Of logits [B, N], sample numbers [B] and the size of the global batch: the loss, and its gradient times the precision's scale.
LossFunction = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Trainer:
    """The state of a run on one rank, and what an epoch does to it.

    Everything random is a function of the seed and of what it is for (data.draws, data.batches), so that the state to save is
    the network, the momentum, the bank and the place in the schedule.

    Args:
        config: with ``split`` resolved.
        dataset: its images made for this rank's device.
        labels: int64 ``[M]``, on the CPU, the split: −1 for an unlabelled sample.
        ranks: the processes of the run.

    Attributes:
        schedule: all epochs of the run.
        rows: metrics of the epochs done; their number is the position in the schedule.
        step: steps done of the epoch after them.

    Raises:
        ConfigError: the configuration does not fit the data.
    """

    def __init__(self, config: Config, dataset: Dataset, labels: Tensor, ranks: Ranks) -> None:
        self.config = config
        self.data = dataset
        self.ranks = ranks
        device = ranks.device
        self.labels = labels
        self.labelled = (labels >= 0).nonzero().flatten()
        # Stage 1 by itself needs none of them: ImageNet's pseudo-logits are 4.6 GB.
        self.unlabelled = (labels < (0 if config.stages != (1,) else -1)).nonzero().flatten()
        check_values(config, min(dataset.train.shape[1:]), ranks.count)
        check_schedule(config, len(self.labelled), len(self.unlabelled), ranks.count)
        self.schedule = make_schedule(config, len(self.labelled), len(self.unlabelled), ranks.count)
        self.batches = Batches(self.labelled, self.unlabelled, config.seed, ranks.rank, ranks.count)
        # What is random in an epoch depends on its number in a run of all stages, so that stages 2 and 3 do the same after a
        # stage 1 of their own and after that of another run.
        self._first = 0 if 1 in config.stages else config.stage1.epochs
        self.rows: list[dict[str, Any]] = []
        self._losses = torch.zeros(0)

        torch.manual_seed(config.seed)
        self.model = make_network(config, dataset.train.shape, dataset.num_classes, device)
        self.network = self.model
        if config.compile:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            # Sizes of a batch are few: compiled for any size, a network would serve the usual ones worse. Those of a run before
            # this one count towards Dynamo's limit of 8.
            torch.compiler.reset()
            self.network = cast(nn.Module, torch.compile(self.model, mode=mode, dynamic=False))
        if ranks.count > 1:
            self.network = DistributedDataParallel(self.network, device_ids=[device] if device.type == "cuda" else None)
        self.precision = Precision(config.precision, device)
        self.optimizer = make_optimizer(config, self.model)
        self._own(0)
        self.bank = ranks.all(lambda: make_bank(config, labels[self._samples], dataset.num_classes, ranks))
        self.d2_loss = FusedD2Loss(
            self.bank, config.alpha, config.beta, config.label_lr, class_loss=config.class_loss, statistics=True
        )
        assert self.d2_loss.statistics is not None
        self.statistics = self.d2_loss.statistics
        self.theorems = TheoremMetrics(self.bank, config.alpha, config.beta, config.class_loss)
        self._begin_epoch()

    # ------------------------------------------------------------------------------------------- an epoch

    def run_epoch(
        self, pause: Callable[[], None] = lambda: None, predicted: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Train what is left of the next epoch of the schedule; its metrics, which are added to ``rows``.

        ``predicted`` is called after a prediction, before the first step changes what it gave the bank.
        ``pause`` is called again and again, wherever :meth:`state_dict` may be; if it raises, another trainer can go on from
        there. Raises DivergenceError, with the epoch and step, for a loss that is not finite.
        """
        epoch = self.schedule[len(self.rows)]
        if self.step == 0:
            if epoch.epoch == 0:
                # Momentum belongs to a stage; in stage 2 it is kept over repredictions and changes of the learning rate.
                self.optimizer = make_optimizer(self.config, self.model)
            if epoch.predicts:
                self.predict(pause)
                predicted()
        order = list(self.order(epoch))[self.step :]
        began = time.perf_counter()
        self.train(epoch, order, pause)
        mean_loss = self._check_losses(epoch)
        trained = time.perf_counter() - began
        row = {
            "stage": epoch.stage,
            "epoch": epoch.epoch,
            "repredicted": epoch.repredicts,
            "lr": epoch.lr(0),
            "train_loss": mean_loss,
            **self.test_errors(pause),
            "pseudo_label_error": self.pseudo_label_error() if epoch.stage > 1 else None,
            # None where this process only evaluated an epoch that another had trained.
            "images_per_second": sum(total for _, _, total in order) / trained if order else None,
            "outside_network": self.outside_network(trained),
            "bad_images": self.ranks.total(len(self.data.train.bad_images)),
        }
        if epoch.stage == 2:
            self.ranks.sum_(self.statistics)
            row |= self.d2_loss.read_statistics() | self.theorems.read(self.ranks)
        # From the end of the epoch before, so that their sum counts predictions and checkpoints too.
        row["seconds"] = self._seconds()
        self.rows.append(row)
        self._begin_epoch()
        return row

    def train(self, epoch: Epoch, order: list[tuple[Tensor, Tensor, int]], pause: Callable[[], None]) -> None:
        """Take the steps of ``order``, batches of :meth:`order`, of an epoch; ``pause`` as in :meth:`run_epoch`."""
        if not order:
            return
        loss_function = self._loss_function(epoch)
        cutout = 0 if epoch.stage == 2 else self.config.cutout
        augmentation = Augmentation(self.config.translate, self.config.border, self.config.flip, cutout)
        loaded = self.data.train.batches([(index, draws) for index, draws, _ in order], augmentation, self.config.seed)
        # The whole epoch's at once: from ordinary memory each copy to a GPU would make the host wait.
        sizes = [len(index) for index, _, _ in order]
        indices = torch.cat([index for index, _, _ in order]).to(self.ranks.device).split(sizes)
        self.network.train()
        for images, index, (_, _, total) in zip(loaded, indices, order, strict=True):
            self._train_step(epoch, images, index, total, loss_function)
            if self.step % self.config.log_interval == 0:
                self._check_losses(epoch)
            pause()

    def _train_step(self, epoch: Epoch, images: Tensor, index: Tensor, total: int, loss_function: LossFunction) -> None:
        self._seed(fold(self.config.seed, self._first + len(self.rows), self.step, self.ranks.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = epoch.lr(self.step)
        self._watch.next_step()
        with self._watch, self.precision.autocast():
            logits = self.network(images)
        # The loss apart from the network's graph: its time is not the network's, and D2 needs no autograd.
        loss, grad = loss_function(logits.detach(), index, total)
        with self._watch:
            self.optimizer.zero_grad()
            logits.backward(grad)
            self.precision.step(self.optimizer)
        self._losses[self.step] = loss
        self.step += 1

    def outside_network(self, seconds: float) -> float | None:
        """The share of ``seconds``, those of the epoch's steps, that the network's passes did not take, 0 … 1."""
        return self._watch.share_outside(seconds)

    def order(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Batches of an epoch: sample numbers and draw numbers of this rank, size of the global batch."""
        config, number = self.config, self._first + len(self.rows)
        if epoch.stage == 1:
            return self.batches.shuffled(self.labelled, config.stage1.batch, number)
        if epoch.stage == 3:
            return self.batches.shuffled(torch.arange(len(self.labels)), config.stage3.batch, number)
        sizes = config.stage2.unlabelled_batch, config.stage2.labelled_batch
        return self.batches.mixed(sizes, number, epoch.epoch, self._last_prediction())

    def _loss_function(self, epoch: Epoch) -> LossFunction:
        """Each rank divides by its share of the global batch, as gradients are averaged over ranks."""
        if epoch.stage == 2:
            return self._d2
        # Stage 1 draws no unlabelled sample, and the pseudo-labels of a large bank take long to read.
        targets = self.labels.to(self.ranks.device) if epoch.stage == 1 else self.hard_labels()

        def cross_entropy(logits: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
            leaf = logits.requires_grad_()
            loss = F.cross_entropy(leaf.float(), targets[index], reduction="sum") * (self.ranks.count / total)
            (grad,) = torch.autograd.grad(loss * self.precision.scale(), leaf)
            return loss.detach(), grad

        return cross_entropy

    def _d2(self, logits: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
        self.d2_loss.normalizer = total / self.ranks.count
        self.d2_loss.update_normalizer = float(total)
        local = self._local[index]
        loss, grad = self.d2_loss.step(logits, local, self.precision.scale())
        if self.step == len(self._losses) - 1:
            self.theorems.measure(logits, local)
        return loss, grad

    # ------------------------------------------------------------------------------------------- between epochs

    def predict(self, pause: Callable[[], None] = lambda: None) -> None:
        """Give every unlabelled sample the network's own logits as pseudo-logits: eval mode, no augmentation.

        The samples are dealt to the ranks anew, each of which predicts its own.
        """
        self._own(self._last_prediction())
        own = self._samples[: len(self.bank.pseudo_logits)]
        local = torch.arange(len(own), device=self.ranks.device)
        finite = True
        for index, logits in zip(_pieces(local), self.evaluate(self.data.train, own, pause), strict=True):
            if torch.isfinite(logits).all():
                self.bank.predict_(index, logits)
            else:  # on to the end, where all ranks hear of it
                finite = False
        if self.ranks.largest(not finite):
            raise DivergenceError(f"predicted logits are not finite after {len(self.rows)} epochs; {DIVERGED}")
        self.theorems.predicted()

    def test_errors(self, pause: Callable[[], None] = lambda: None) -> dict[str, float]:
        """``test_error`` on the test images, in percent; with many classes ``test_error_top5``, too."""
        part = self.ranks.part(len(self.data.test))
        labels = _pieces(self.data.test_labels[part].to(self.ranks.device))
        samples = torch.arange(part.start, part.stop)
        kinds = {"test_error": 1} | ({"test_error_top5": 5} if self.data.num_classes >= CLASSES_FOR_TOP5 else {})
        right = torch.zeros(len(kinds), dtype=torch.int64, device=self.ranks.device)
        for logits, label in zip(self.evaluate(self.data.test, samples, pause), labels, strict=True):
            hits = logits.topk(max(kinds.values())).indices == label[:, None]
            right += torch.stack([hits[:, :k].sum() for k in kinds.values()])
        wrong = len(self.data.test) - self.ranks.sum_(right)
        return {kind: 100 * count / len(self.data.test) for kind, count in zip(kinds, wrong.tolist(), strict=True)}

    def hard_labels(self) -> Tensor:
        """int64 ``[M]``, the same on every rank: ground truth where there is any, argmax of the pseudo-label elsewhere."""
        rows = len(self.bank.pseudo_logits)
        labels = torch.zeros(len(self.labels), dtype=torch.int64, device=self.ranks.device)
        labels[self._samples[:rows].to(labels.device)] = self.bank.hard_labels()[:rows]
        self.ranks.sum_(labels)
        labels[self.labelled.to(labels.device)] = self.labels[self.labelled].to(labels.device)
        return labels

    def pseudo_confidence(self) -> Tensor:
        """float32 ``[M]``, the same on every rank: the largest probability of the pseudo-label, 1 for a labelled sample."""
        confidence = torch.zeros(len(self.labels), device=self.ranks.device)
        own = self._samples[: len(self.bank.pseudo_logits)].to(confidence.device)
        for samples, rows in zip(_pieces(own), _pieces(self.bank.pseudo_logits), strict=True):
            confidence[samples] = rows.to(confidence.device).float().softmax(1).amax(1)
        self.ranks.sum_(confidence)
        confidence[self.labelled.to(confidence.device)] = 1
        return confidence

    def pseudo_label_error(self) -> float | None:
        """Error of the unlabelled samples' pseudo-labels (argmax) against the true labels, in percent, where those are known."""
        known = self.unlabelled[self.data.train_labels[self.unlabelled] >= 0]
        if len(known) == 0:
            return None
        return 100 * (self.hard_labels().cpu() != self.data.train_labels)[known].double().mean().item()

    @torch.no_grad()
    def evaluate(self, images: Images, samples: Tensor, pause: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """The network's logits, float32 ``[b, N]`` a batch, of the samples ``[n]``: eval mode, no augmentation."""
        self.ranks.share_buffers(self.model)
        self.model.eval()
        order = [(index, index) for index in _pieces(samples)]
        common = self.ranks.smallest(len(order))  # ranks have different numbers of batches, but pauses in common
        for number, batch in enumerate(images.batches(order, None, self.config.seed)):
            with self.precision.autocast():
                logits = self.model(batch)
            yield logits.float()
            if number < common:
                pause()

    # ------------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Any]:
        """The tensors of the state, which share memory with the trainer's; the bank's rows in the order of the partition."""
        state = self.optimizer.state
        momentum = {n: state[p]["momentum_buffer"] for n, p in self.model.named_parameters() if state.get(p)}
        size = (len(self.unlabelled), self.data.num_classes)
        rows = self.bank.pseudo_logits
        if self.bank.host_rows is not None:
            # As a GPU's tensor they would be copied on the GPU first, since they have gaps, and it may be smaller than the bank.
            rows = self.bank.host_rows
            torch.cuda.synchronize()
        return {
            "network": self.model.state_dict(),
            "momentum": momentum,
            "bank": self.ranks.shard(rows, size),
            "bank_sums": self.ranks.shard(self.theorems.sums, (len(self.unlabelled), 1)),
        }

    def values(self) -> dict[str, Any]:
        """The rest of the state, as plain values for JSON."""
        return {
            "rows": self.rows,
            "step": self.step,
            "losses": self._mean_losses().tolist(),
            "statistics": self.ranks.gather(self.statistics).tolist(),
            "theorems": self.ranks.gather(self.theorems.measured).tolist(),
            "seconds": self._seconds(),
            "updates": int(self.bank.updates),
            "scaler": self.precision.scaler.state_dict(),
            "precision": self.precision.name,
        }

    def load_values(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`values` gave; then the tensors can be loaded into those that :meth:`tensors` gives."""
        self.rows = values["rows"]
        self._begin_epoch()
        # On another number of ranks an epoch can be a step or two shorter.
        self.step = min(values["step"], len(self._losses))
        self._losses[: self.step] = torch.tensor(values["losses"][: self.step])
        for name, sums in (("statistics", self.statistics), ("theorems", self.theorems.measured)):
            saved = torch.tensor(values[name], dtype=torch.float64)
            if len(saved) != self.ranks.count:
                saved = torch.cat([saved.sum(0, True), torch.zeros(self.ranks.count - 1, saved.shape[1])])
            sums.copy_(saved[self.ranks.rank])
        self._spent = values["seconds"]
        self.bank.updates.fill_(values["updates"])
        if values["scaler"]:  # not if auto was another precision on the machine before
            self.precision.scaler.load_state_dict(values["scaler"])
        self._own(self._last_prediction())

    def go_to(self, position: int) -> None:
        """Go to the beginning of an epoch, as if those before it had been."""
        self.rows = [{} for _ in range(position)]
        self._begin_epoch()
        self._own(self._last_prediction())

    def _begin_epoch(self) -> None:
        self.step = 0
        steps = self.schedule[len(self.rows)].steps if len(self.rows) < len(self.schedule) else 0
        self._losses = torch.zeros(steps, device=self.ranks.device)
        self._watch = Stopwatch(self.ranks.device)
        self._began = time.perf_counter()
        self._spent = 0.0  # of this epoch, before this process resumed it

    def _seconds(self) -> float:
        return self._spent + time.perf_counter() - self._began

    def _last_prediction(self) -> int:
        """The number in the run of the epoch with the last prediction up to now, 0 if there was none."""
        done = self.schedule[: len(self.rows) + 1]
        return max((number for number, epoch in enumerate(done, self._first) if epoch.predicts), default=0)

    def _own(self, prediction: int) -> None:
        """Take over this rank's part of the unlabelled samples: row i of the bank is the i-th of them.

        Sample numbers of the bank are local: unlabelled ones of this rank, then all labelled ones.
        """
        self._samples = torch.cat([self.batches.partition(prediction)[self.ranks.rank], self.labelled])
        local = torch.full((len(self.labels),), -1)
        local[self._samples] = torch.arange(len(self._samples))
        self._local = local.to(self.ranks.device)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed() takes 15 times as long
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _mean_losses(self) -> Tensor:
        """Of the steps so far, over the ranks."""
        return self.ranks.sum_(self._losses[: self.step].clone()) / self.ranks.count

    def _check_losses(self, epoch: Epoch) -> float:
        """Mean loss of the steps so far, of all ranks."""
        losses = self._mean_losses()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step = int(bad[0])
            raise DivergenceError(
                f"the loss is {losses[step].item()} in stage {epoch.stage}, epoch {epoch.epoch}, step {step}; "
                + DIVERGED
            )
        return losses.double().mean().item()


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Batches for evaluation: none of nothing, which a rank has where images are few."""
    return [piece for piece in tensor.split(EVALUATION_BATCH) if len(piece)]


DIVERGED = "the network has diverged: lower the learning rate of the stage and start in another --run-dir."
