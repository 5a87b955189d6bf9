"""The training loop: one for all three stages, which differ in data, targets and two switches."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2d2fast import FusedD2Loss, PseudoLabelBank
from r2d2fast.data import ImageDataset, LabelledStream, mixed_batches, shuffled_batches, split_labels, translate
from r2d2fast.models import small_convnet
from r2d2fast.train.checks import check_schedule, check_values
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, DivergenceError
from r2d2fast.train.schedule import Epoch, make_schedule

EVALUATION_BATCH = 512


class Trainer:
    """The state of a run and what one epoch does to it.

    Args:
        config: with ``split`` and ``device`` resolved.
        dataset: on the CPU.

    Attributes:
        schedule: all epochs of the run.
        rows: metrics of the epochs done; their number is the position in the schedule.

    Raises:
        ConfigError: the configuration does not fit the data.
    """

    def __init__(self, config: Config, dataset: ImageDataset) -> None:
        self.config = config
        device = torch.device(config.device)
        check_values(config, min(dataset.train_images.shape[2:]))
        assert config.split is not None
        try:
            labels = split_labels(dataset.train_labels, dataset.num_classes, config.num_labels, config.split)
        except ValueError as error:
            raise ConfigError(f"--num-labels: {error}") from error
        self.data = dataset.to(device)
        self.labelled = (labels >= 0).nonzero().flatten().to(device)
        self.unlabelled = (labels < 0).nonzero().flatten().to(device)
        self.everything = torch.arange(len(labels), device=device)
        check_schedule(config, len(self.unlabelled))
        self.schedule = make_schedule(config, len(self.labelled), len(self.unlabelled))
        self.rows: list[dict[str, Any]] = []
        self.epoch_began = time.perf_counter()

        torch.manual_seed(config.seed)
        # Channels last: 1.2 to 1.5 times faster a step on a CPU for the digits network.
        self.model = small_convnet(dataset.train_images.shape[1], dataset.num_classes)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = self._make_optimizer()
        self.bank = PseudoLabelBank(labels, dataset.num_classes, config.label_scale, device=device)
        self.d2_loss = FusedD2Loss(
            self.bank, config.alpha, config.beta, config.label_lr, class_loss=config.class_loss, statistics=True
        )
        self.order = torch.Generator(device).manual_seed(2 * config.seed)
        self.augmentation = torch.Generator(device).manual_seed(2 * config.seed + 1)
        self.stream = LabelledStream(self.labelled, self.order)

    def run_epoch(self) -> dict[str, Any]:
        """Train the next epoch of the schedule; its metrics, which are added to ``rows``.

        Raises DivergenceError, with the epoch and step, for a loss that is not finite.
        """
        epoch = self.schedule[len(self.rows)]
        if epoch.epoch == 0:
            # Momentum belongs to a stage; in stage 2 it is kept over repredictions and changes of the learning rate.
            self.optimizer = self._make_optimizer()
        if epoch.predicts:
            self.predict()
        batches, loss_function = self._stage(epoch)
        self.model.train()
        start = time.perf_counter()
        losses = []
        seen = 0
        for step, index in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = epoch.lr(step)
            images = translate(
                self.data.train_images[index], self.config.translate, self.data.background, self.augmentation
            )
            loss = loss_function(self.model(images), index)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            seen += len(index)
        # Read once an epoch: reading every step would make a GPU wait for each.
        mean_loss = self._check_losses(torch.stack(losses), epoch)
        trained = time.perf_counter()
        row = {
            "stage": epoch.stage,
            "epoch": epoch.epoch,
            "repredicted": epoch.repredicts,
            "lr": epoch.lr(0),
            "train_loss": mean_loss,
            "test_error": self.test_error(),
            "pseudo_label_error": self.pseudo_label_error() if epoch.stage > 1 else None,
            "images_per_second": seen / (trained - start),
        }
        if epoch.stage == 2:
            row |= self.d2_loss.read_statistics()
        now = time.perf_counter()
        # From the end of the epoch before, so that their sum counts predictions and checkpoints too.
        row["seconds"], self.epoch_began = now - self.epoch_began, now
        self.rows.append(row)
        return row

    def _stage(self, epoch: Epoch) -> tuple[Iterator[Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """What makes the stages differ: batches of indices, and a loss of (logits, index)."""
        config = self.config
        if epoch.stage == 2:
            sizes = config.stage2.unlabelled_batch, config.stage2.labelled_batch
            return mixed_batches(self.unlabelled, self.stream, *sizes, self.order), self.d2_loss
        # True labels of labelled samples, argmax of the pseudo-label for the others, which stage 1 does not draw.
        targets = self.bank.hard_labels()
        samples, size = (
            (self.labelled, config.stage1.batch) if epoch.stage == 1 else (self.everything, config.stage3.batch)
        )
        return (
            shuffled_batches(samples, size, self.order),
            lambda logits, index: F.cross_entropy(logits, targets[index]),
        )

    def predict(self) -> None:
        """Give every unlabelled sample the network's own logits as pseudo-logits: eval mode, no augmentation."""
        for index in self.unlabelled.split(EVALUATION_BATCH):
            logits = self._evaluate(self.data.train_images[index])
            if not torch.isfinite(logits).all():
                raise DivergenceError(f"predicted logits are not finite after {len(self.rows)} epochs; {DIVERGED}")
            self.bank.predict_(index, logits)

    def test_error(self) -> float:
        """Error on the test images, in percent."""
        predicted = torch.cat(
            [self._evaluate(images).argmax(1) for images in self.data.test_images.split(EVALUATION_BATCH)]
        )
        return 100 * (predicted != self.data.test_labels).double().mean().item()

    def pseudo_label_error(self) -> float:
        """Error of the unlabelled samples' pseudo-labels (argmax) against the true labels, in percent."""
        wrong = self.bank.hard_labels() != self.data.train_labels
        return 100 * wrong[self.unlabelled].double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.state_dict(),
            "queue": self.stream.queue,
            "generators": [self.order.get_state(), self.augmentation.get_state()],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.load_state_dict(state["bank"])
        self.stream.queue = state["queue"].to(self.labelled.device)
        self.order.set_state(state["generators"][0])
        self.augmentation.set_state(state["generators"][1])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.rows = state["rows"]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # The learning rate is set at every step, from the schedule.
        return torch.optim.SGD(
            self.model.parameters(),
            lr=0.0,
            momentum=self.config.momentum,
            nesterov=self.config.momentum > 0,
            weight_decay=self.config.weight_decay,
        )

    @torch.no_grad()
    def _evaluate(self, images: Tensor) -> Tensor:
        self.model.eval()
        return self.model(images)

    @staticmethod
    def _check_losses(losses: Tensor, epoch: Epoch) -> float:
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step = int(bad[0])
            raise DivergenceError(
                f"the loss is {losses[step].item()} in stage {epoch.stage}, epoch {epoch.epoch}, step {step}; "
                + DIVERGED
            )
        return losses.double().mean().item()


DIVERGED = "the network has diverged: lower the learning rate of the stage and start in another --run-dir."
