"""Whole steps of training as CUDA graphs: the batch, forward pass, loss, D2 step, backward pass and optimizer in one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r2d2fast.data import Augmentation, Batch
from r2d2fast.data.order import keys_of
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.methods import METHODS, LossFunction
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks

if TYPE_CHECKING:
    from r2d2fast.train.schedule import Epoch
    from r2d2fast.train.trainer import Trainer

WARM_UP = 3
"""So many steps of a kind are taken one operation at a time before the next is captured: in them kernels are loaded, libraries
choose their algorithms, and memory is allocated, none of which can be captured."""

Step = Callable[..., None]
"""Takes a step, of its number, int64 ``[1]`` on the device, and the views of its batch, none where it makes them itself."""


def check_cuda_graphs(config: Config, ranks: Ranks, precision: Precision) -> None:
    """Raise ConfigError where ``--cuda-graphs`` cannot be: whatever differs between two steps of an epoch has to be in a tensor,
    and the host must not wait for the device in a step."""
    capturable = ", ".join(name for name, method in METHODS.items() if method.capturable)
    forbidden = {
        "needs a GPU; leave it out on a CPU": ranks.device.type != "cuda",
        "is for one process; leave it out under torchrun": ranks.count > 1,
        "and --compile, which has CUDA graphs of its own: give one of them": config.compile,
        "cannot be in float16, the precision of GPUs without bfloat16, whose GradScaler waits for the device; leave it out, or "
        "take --precision float32": precision.scaler.is_enabled(),
        f"and --method {config.method}, whose loss changes from step to step; accepted: {capturable}": not METHODS[
            config.method
        ].capturable,
    }
    for reason, applies in forbidden.items():
        if applies:
            raise ConfigError(f"--cuda-graphs {reason}")


class StepTable:
    """What differs between the steps of an epoch, on the device, where a captured step finds its own by its number.

    Args:
        steps, size: of the epoch: its steps, and the samples of a batch, of which the last may have fewer.
        device: of the run.
    """

    def __init__(self, steps: int, size: int, device: torch.device) -> None:
        self.size = size
        self.numbers = torch.arange(steps, device=device)
        self._samples = torch.zeros(steps, size, dtype=torch.int64, device=device)
        self._keys = torch.zeros_like(self._samples)
        self._rates = torch.zeros(2, steps, device=device)

    def fill(self, first: int, batches: Sequence[Batch], lrs: Sequence[float], shares: Sequence[float]) -> None:
        """The steps from ``first`` on: their batches, learning rates and shares in the averaged weights."""
        steps = slice(first, first + len(batches))
        for table, column in (
            (self._samples, [one.samples for one in batches]),
            (self._keys, list(map(keys_of, batches))),
        ):
            values = torch.cat(column)
            table[steps].view(-1)[: len(values)].copy_(values)
        self._rates[:, steps].copy_(torch.tensor([lrs, shares]))

    def row(self, number: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a step with a batch of ``size``: samples and keys, int64 ``[size]``; rate and share, float32 ``[1]``."""
        samples, keys = (table.index_select(0, number)[0, :size] for table in (self._samples, self._keys))
        lr, share = self._rates.index_select(1, number)
        return samples, keys, lr, share


class CapturedStep:
    """One kind of step as a CUDA graph, which reads what it is given from memory of its own."""

    def __init__(self, step: Step, given: tuple[Tensor, ...], stream: torch.cuda.Stream | None) -> None:
        self.given = tuple(tensor.clone() for tensor in given)
        self._step = step  # a graph reads where its tensors were, and keeps none of them
        self.graph = torch.cuda.CUDAGraph()
        # Threads that load images may go on meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            step(*self.given)

    def replay(self, given: tuple[Tensor, ...]) -> None:
        """Take the step of another number, on other views of the same shapes."""
        for own, other in zip(self.given, given, strict=True):
            own.copy_(other)
        self.graph.replay()


class CapturedSteps:
    """The steps of a trainer, each kind captured when it has been taken :data:`WARM_UP` times."""

    _table: StepTable

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of this GPU: PyTorch's own for captures is of the one that came first in the process.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lr = torch.zeros((), device=device)
        self.restart()

    def restart(self) -> None:
        """Forget what was captured: a step reads or writes other tensors from now on."""
        self._taken: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, CapturedStep] = {}
        self._table = StepTable(0, 0, self._device)

    def steps(
        self,
        trainer: Trainer,
        epoch: Epoch,
        batches: list[Batch],
        augmentation: Augmentation,
        loss_function: LossFunction,
    ) -> Iterator[None]:
        """Those of ``Trainer.steps``. The host gives each its number, seeds the generators, and loads images that the device does
        not hold; all else is on the device."""
        method = trainer.method_of(epoch)
        first = trainer.position.step
        make_views = method.views_on_device(augmentation, epoch)
        loaded = method.views(batches, augmentation, epoch) if make_views is None else repeat((), len(batches))
        table = self._table_of(epoch.steps, len(batches[0].samples))
        numbers = range(first, first + len(batches))
        lrs = [trainer.param_group(epoch, number)["lr"] for number in numbers]
        table.fill(first, batches, lrs, [trainer.averaging_share(epoch, number) for number in numbers])
        trainer.set_optimizer(trainer.param_group(epoch, first) | {"lr": self._lr}, epoch)
        for number, views, batch in zip(numbers, loaded, batches, strict=True):
            trainer.seed(number)
            size, total = len(batch.samples), batch.global_size

            def step(number: Tensor, *views: Tensor, size: int = size, total: int = total) -> None:
                index, keys, lr, share = table.row(number, size)
                self._lr.copy_(lr[0])
                if make_views is not None:
                    views = make_views(index, keys)
                # No clock looks into a graph.
                loss = trainer.step(method, views, index, total, loss_function, nullcontext())
                if trainer.averaged is not None:
                    trainer.averaged.update(share[0])
                trainer.losses.index_copy_(0, number, loss[None])

            if number < epoch.steps - 1:
                self._take(step, number, views, (epoch.stage, size, total))
            else:  # in which R2-D2 measures
                step(table.numbers[number:], *views)
            yield

    def _table_of(self, steps: int, size: int) -> StepTable:
        """For an epoch of so many steps, with batches of ``size``: that of the one before, if it was of the same."""
        if (len(self._table.numbers), self._table.size) != (steps, size):
            self.restart()
            self._table = StepTable(steps, size, self._device)
        return self._table

    def _take(self, step: Step, number: int, views: tuple[Tensor, ...], kind: Hashable) -> None:
        """Take a step, captured, replayed or neither.

        ``kind``: all that distinguishes ``step`` from others, the shapes of its views apart. Raises TrainingError where a step
        cannot be captured.
        """
        given = (self._table.numbers[number : number + 1], *views)
        kind = kind, tuple(view.shape for view in views)
        self._taken[kind] += 1
        if self._taken[kind] <= WARM_UP:
            return step(*given)
        if kind not in self._captured:
            before = None if self._stream is None else torch.cuda.current_stream(self._device)
            try:
                self._captured[kind] = CapturedStep(step, given, self._stream)
            except RuntimeError as error:
                if before is not None:
                    torch.cuda.set_stream(before)  # PyTorch leaves that of a capture that has failed
                reason = error.__context__ or error  # of which the end of the capture makes an error of its own
                # It leaves its allocator and its generators as they were in the capture, too, and says that it knows no way back.
                raise TrainingError(
                    f"a step cannot be captured as a CUDA graph: {reason}; go on in a new process without cuda_graphs, to the "
                    "same bits (a run: without --cuda-graphs, with --resume)"
                ) from error
        return self._captured[kind].replay(given)
