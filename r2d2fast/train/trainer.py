"""The training loop: one for all stages and methods. A method says what the loss is; everything else is here."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from r2d2fast.data import Augmentation, Batch, BatchSampler, Dataset, derive_seed
from r2d2fast.train.averaging import WeightAverage
from r2d2fast.train.build import make_network, make_optimizer
from r2d2fast.train.callback import Callback
from r2d2fast.train.captured_steps import CapturedSteps, check_cuda_graphs
from r2d2fast.train.checks import check_schedule, check_values
from r2d2fast.train.config import Config
from r2d2fast.train.errors import DIVERGED, DivergenceError
from r2d2fast.train.evaluation import Evaluator, pseudo_label_error
from r2d2fast.train.methods import METHODS, LossFunction, Method, Supervised
from r2d2fast.train.ownership import Ownership
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.schedule import Epoch, batch_size, make_schedule
from r2d2fast.train.stopwatch import Stopwatch
from r2d2fast.train.threads import choose_threads, cpu_threads


class Position(NamedTuple):
    """How far a run is.

    Attributes:
        epoch: the number in the schedule, from 0, of the epoch that is under way.
        step: the steps of it that are done.
    """

    epoch: int
    step: int


class Trainer:
    """The state of a run on one rank, and what an epoch does to it. It writes no files: a callback may.

    Stage 1 learns from the labelled samples; stages 2 and 3 belong to a method (:mod:`r2d2fast.train.methods`). Everything random
    is a function of the seed and of what it is for (data.random_numbers, data.order), so that the state to save (state.py) is the
    network, the momentum, what the method keeps, the position and what has been measured.

    Args:
        config: with ``split`` resolved.
        dataset: its images made for this rank's device.
        labels: int64 ``[M]``, on the CPU, the split: −1 for an unlabelled sample.
        ranks: the processes of the run.

    Attributes:
        model: the network that is trained; ``network``, the same as it is called in training, compiled and parallel.
        averaged: the moving average of its weights in the stage under way, if the configuration has one; None otherwise.
        method: whose stages 2 and 3 are.
        ownership: which unlabelled samples are this rank's.
        schedule: all epochs of the run.
        position: in the schedule.
        history: the metrics of each epoch done.
        threads: with which an epoch is computed.
        captured: the steps as CUDA graphs, if the configuration wants them; None otherwise.
        callback: what happens between steps; nothing, unless another one is put there.
        losses: float ``[steps]``, of this rank, of the steps of the epoch under way.
        stopwatch: of the network's own time in them.

    Raises:
        ConfigError: the configuration does not fit the data.
    """

    position: Position
    losses: Tensor
    stopwatch: Stopwatch

    def __init__(self, config: Config, dataset: Dataset, labels: Tensor, ranks: Ranks) -> None:
        self.config = config
        self.data = dataset
        self.ranks = ranks
        device = ranks.device
        self.labels = labels
        self.labelled = (labels >= 0).nonzero().flatten()
        # Stage 1 by itself needs none of them: ImageNet's pseudo-logits are 4.6 GB.
        self.unlabelled = (labels < (0 if config.stages != (1,) else -1)).nonzero().flatten()
        self.knows_unlabelled = bool((dataset.train_labels[self.unlabelled] >= 0).any())
        METHODS[config.method].check(config, dataset.train)
        check_values(config, dataset.train.shape, ranks.count)
        check_schedule(config, len(self.labelled), len(self.unlabelled), ranks.count)
        self.schedule = make_schedule(config, len(self.labelled), len(self.unlabelled), ranks.count, len(dataset.test))
        self.history: list[dict[str, Any]] = []
        self.callback = Callback()

        torch.manual_seed(config.seed)
        self.model = make_network(config, dataset, device)
        self.network = self.model
        if config.compile:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            # Sizes of a batch are few: compiled for any size, a network would serve the usual ones worse. Those of a run before
            # this one count towards Dynamo's limit of 8.
            torch.compiler.reset()
            self.network = cast(nn.Module, torch.compile(self.model, mode=mode, dynamic=False))
        if ranks.count > 1:
            # Buffers count where the network is evaluated, which broadcasts them: here they would be written to between two
            # passes of one step.
            devices = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=devices, broadcast_buffers=False)
        self.threads = config.threads or torch.get_num_threads()
        if config.threads == 0 and device.type == "cpu":
            batch = max(batch_size(config, stage) for stage in config.stages) // ranks.count
            self.threads = ranks.on_first(lambda: choose_threads(self.model, dataset.train.shape, batch))
        self.precision = Precision(config.precision, device)
        self.captured: CapturedSteps | None = None
        if config.cuda_graphs:
            check_cuda_graphs(config, ranks, self.precision)
            self.captured = CapturedSteps(device)
        self.optimizer = make_optimizer(config, self.model)
        self.averaged: WeightAverage | None = None
        self.evaluator = Evaluator(self.model, self.precision, ranks, lambda: self.callback.between_steps(self))

        self.sampler = BatchSampler(self.labelled, self.unlabelled, config.seed, ranks.rank, ranks.count)
        self.ownership = Ownership(labels, self.sampler, ranks)
        self.supervised = Supervised(self)
        self.method = METHODS[config.method](self)
        self._losses = torch.zeros(max(epoch.steps for epoch in self.schedule), device=device)
        self._begin_epoch(0)

    # ------------------------------------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Train all epochs of the schedule that are left. Raises DivergenceError."""
        while self.position.epoch < len(self.schedule):
            self.run_epoch()

    def run_epoch(self) -> dict[str, Any]:
        """Train what is left of the epoch under way; its metrics, which are added to ``history``.

        Raises DivergenceError, with the epoch and step, for a loss that is not finite.
        """
        with cpu_threads(self.threads):
            epoch, metrics = self._run_epoch()
        self.callback.epoch_ended(self, epoch, metrics)
        return metrics

    def _run_epoch(self) -> tuple[Epoch, dict[str, Any]]:
        """The epoch, which is the last of its stage where the method ends it early, and its metrics."""
        epoch = self.schedule[self.position.epoch]
        method = self.method_of(epoch)
        if self.position.step == 0:
            if epoch.epoch == 0:
                # Momentum belongs to a stage; in stage 2 it is kept over repredictions and changes of the learning rate.
                self.optimizer = make_optimizer(self.config, self.model)
            method.before_epoch(epoch)
            if self.captured is not None and (epoch.epoch == 0 or epoch.predicts):
                self.captured.restart()
        batches = self.batches()[self.position.step :]
        began = time.perf_counter()
        self.train(batches)
        mean_loss = self._check_losses()
        seconds = time.perf_counter() - began
        stopped = method.stops(epoch)
        if stopped:
            epoch = replace(epoch, last=True)
        if epoch.last and self.averaged is not None:
            self.model.load_state_dict(self.averaged.model.state_dict())
        metrics = self._measure(epoch, mean_loss, batches, seconds) | {"stopped": stopped}
        if epoch.last:
            # The next stage has another. Not before the evaluation: a run that is stopped in it finds what it has saved.
            self.averaged = None
        self.history.append(metrics)
        following = list(range(self.position.epoch + 1, len(self.schedule)))
        if stopped:
            following = [number for number in following if self.schedule[number].stage != epoch.stage]
        self._begin_epoch(next(iter(following), len(self.schedule)))
        return epoch, metrics

    def method_of(self, epoch: Epoch) -> Method:
        """Whose steps those of ``epoch`` are."""
        return self.supervised if epoch.stage == 1 else self.method

    def batches(self) -> list[Batch]:
        """This rank's batches of the epoch under way, all of them."""
        config, epoch, number = self.config, self.schedule[self.position.epoch], self._number(self.position.epoch)
        if epoch.stage == 1:
            return list(self.sampler.shuffled(self.labelled, config.stage1.batch, number))
        if epoch.stage == 3:
            return list(self.sampler.shuffled(torch.arange(len(self.labels)), config.stage3.batch, number))
        sizes = config.stage2.unlabelled_batch, config.stage2.labelled_batch
        return list(self.sampler.mixed(sizes, number, epoch.epoch, self.last_prediction()))

    def train(self, batches: list[Batch]) -> None:
        """Take a step for each of ``batches``, those that come next in the epoch under way."""
        if not batches:
            return
        epoch = self.schedule[self.position.epoch]
        method = self.method_of(epoch)
        loss_function = method.loss_function(epoch)
        cutout = 0 if epoch.stage == 2 else self.config.cutout
        augmentation = Augmentation(self.config.translate, self.config.border, self.config.flip, cutout)
        self.network.train()
        if self.captured is None:
            steps = self.steps(epoch, batches, augmentation, loss_function)
        else:
            steps = self.captured.steps(self, epoch, batches, augmentation, loss_function)
        for _ in steps:
            self.position = Position(self.position.epoch, self.position.step + 1)
            if self.position.step % self.config.log_interval == 0:
                self._check_losses()
            self.callback.between_steps(self)

    def steps(
        self, epoch: Epoch, batches: list[Batch], augmentation: Augmentation, loss_function: LossFunction
    ) -> Iterator[None]:
        """Optimizer steps, one for each of ``batches``, taken one operation at a time."""
        method = self.method_of(epoch)
        loaded = method.views(batches, augmentation, epoch)
        # The whole epoch's at once: from ordinary memory each copy to a GPU would make the host wait.
        sizes = [len(batch.samples) for batch in batches]
        indices = torch.cat([batch.samples for batch in batches]).to(self.ranks.device).split(sizes)
        for views, index, batch in zip(loaded, indices, batches, strict=True):
            step = self.position.step
            self.seed(step)
            settings = self.param_group(epoch, step)
            if self.ranks.device.type == "cuda":
                settings["lr"] = torch.tensor(settings["lr"]).item()  # rounded to float32, as a captured step has it
            self.set_optimizer(settings, epoch)
            self.stopwatch.next_step()
            self.losses[step] = self.step(method, views, index, batch.global_size, loss_function, self.stopwatch)
            if self.averaged is not None:
                with self.stopwatch:
                    self.averaged.update(self.averaging_share(epoch, step))
            yield

    def step(
        self,
        method: Method,
        views: tuple[Tensor, ...],
        index: Tensor,
        total: int,
        loss_function: LossFunction,
        timed: AbstractContextManager[Any],
    ) -> Tensor:
        """One optimizer step on the samples ``index`` ``[B]``, of ``total`` on all ranks, as ``views`` show them; its loss, a
        scalar. The network's own part of it is ``timed``."""
        with timed, self.precision.autocast():
            logits = method.forward(views)
        # The loss apart from the network's graph: its time is not the network's, and D2 needs no autograd.
        loss, grad = loss_function(logits, index, total)
        with timed:
            self.optimizer.zero_grad()
            logits.backward(grad)
            self.precision.step(self.optimizer)
        return loss

    def averaging_share(self, epoch: Epoch, step: int) -> float:
        """How much of the network goes into its averaged weights after a step: of step n of a stage 1 / (n + 1), until that is
        below 1 − ``ema``. So the first steps count alike, and the initial weights no more than each of them."""
        done = epoch.epoch * epoch.steps + step + 1
        return 1 - min(self.config.ema, done / (done + 1))

    def set_optimizer(self, settings: dict[str, Any], epoch: Epoch) -> None:
        """Give the optimizer ``settings``, and the weight decay of the stage."""
        for group in self.optimizer.param_groups:
            group |= settings | {"weight_decay": self._weight_decay(epoch.stage)}

    def param_group(self, epoch: Epoch, step: int) -> dict[str, Any]:
        """The optimizer's settings for a step, weight decay apart."""
        return self.method_of(epoch).param_group(epoch.lr(step), self._progress(epoch, step))

    def _weight_decay(self, stage: int) -> float:
        own = self.config.stage2.weight_decay if stage == 2 else None
        return self.config.weight_decay if own is None else own

    def _measure(self, epoch: Epoch, mean_loss: float, batches: list[Batch], seconds: float) -> dict[str, Any]:
        """The metrics of an epoch whose last ``batches`` this process has trained in so many seconds."""
        evaluates = epoch.evaluates or epoch.last  # the last one may only now have become it
        errors = self.evaluator.test_errors(self.data) if evaluates else {"test_error": None}
        label_error = None
        # A bank of a million samples takes a second to look through: not where the result is that nobody knows.
        if epoch.stage > 1 and self.knows_unlabelled and (labels := self.method.hard_labels()) is not None:
            label_error = pseudo_label_error(labels, self.unlabelled, self.data.train_labels)
        metrics = {
            "stage": epoch.stage,
            "epoch": epoch.epoch,
            "repredicted": epoch.repredicts,
            "lr": self.param_group(epoch, 0)["lr"],
            "train_loss": mean_loss,
            **errors,
            "pseudo_label_error": label_error,
            # None where this process only evaluated an epoch that another had trained.
            "images_per_second": sum(batch.global_size for batch in batches) / seconds if batches else None,
            "outside_network": self.stopwatch.share_outside(seconds),
            # Small images are decoded by every rank, and photographs go from rank to rank at predictions.
            "bad_images": len(set().union(*self.ranks.gather_objects(set(self.data.train.bad_images)))),
            **self.method_of(epoch).metrics(epoch),
        }
        # From the end of the epoch before, so that their sum counts predictions and checkpoints too.
        return metrics | {"seconds": self.seconds()}

    # ------------------------------------------------------------------------------------------- where the run is

    def progress(self) -> float:
        """The share of the stage that is done, 0 to below 1."""
        return self._progress(self.schedule[self.position.epoch], self.position.step)

    def _progress(self, epoch: Epoch, step: int) -> float:
        return (epoch.epoch + step / epoch.steps) / getattr(self.config, f"stage{epoch.stage}").epochs

    def go_to(self, epoch: int) -> None:
        """Go to the beginning of an epoch of the schedule, whatever has been trained."""
        self._begin_epoch(epoch)
        self.ownership.deal(self.last_prediction())
        if self.captured is not None:
            self.captured.restart()

    def _begin_epoch(self, epoch: int) -> None:
        self.position = Position(epoch, 0)
        steps = self.schedule[epoch].steps if epoch < len(self.schedule) else 0
        self.losses = self._losses[:steps].zero_()
        self.stopwatch = Stopwatch(self.ranks.device)
        stage = self.schedule[epoch].stage if epoch < len(self.schedule) else None
        if stage is None:
            self.averaged = None
        elif self.config.ema and self.averaged is None:
            self.averaged = WeightAverage(self.model)
        self.evaluator.model = self.model if self.averaged is None else self.averaged.model
        self.method.at_stage(stage)
        self._began = time.perf_counter()
        self.seconds_before = 0.0  # of this epoch, in the process that this one resumes

    def seconds(self) -> float:
        """Of the epoch under way, up to now."""
        return self.seconds_before + time.perf_counter() - self._began

    def _number(self, epoch: int) -> int:
        """The number of an epoch in a run of all stages, on which what is random in it depends: so stages 2 and 3 do the same
        after a stage 1 of their own and after that of another run."""
        return epoch if 1 in self.config.stages else self.config.stage1.epochs + epoch

    def last_prediction(self) -> int:
        """The number in a run of all stages of the epoch with the last prediction up to now, 0 if there was none."""
        begun = enumerate(self.schedule[: self.position.epoch + 1])
        return max((self._number(place) for place, epoch in begun if epoch.predicts), default=0)

    def seed(self, step: int) -> None:
        """Seed PyTorch's generators for a step of the epoch under way."""
        seed = derive_seed(self.config.seed, self._number(self.position.epoch), step, self.ranks.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed() takes 15 times as long
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def mean_losses(self) -> Tensor:
        """Of the steps so far, over the ranks."""
        return self.ranks.sum_(self.losses[: self.position.step].clone()) / self.ranks.count

    def _check_losses(self) -> float:
        """Mean loss of the steps so far, of all ranks. Raises DivergenceError where one is not finite."""
        losses = self.mean_losses()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            step, epoch = int(bad[0]), self.schedule[self.position.epoch]
            raise DivergenceError(
                f"the loss is {losses[step].item()} in stage {epoch.stage}, epoch {epoch.epoch}, step {step}; {DIVERGED}"
            )
        return losses.double().mean().item()
