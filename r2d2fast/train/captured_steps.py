"""Whole steps of training as CUDA graphs: forward pass, loss, D2 step, backward pass and optimizer in one launch."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from r2d2fast.data.order import Batch, keys_of
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.methods import METHODS
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks

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
        "needs --precision bfloat16 or float32: the GradScaler of float16 waits for the device": precision.scaler.is_enabled(),
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

    def __init__(self, step: Step, given: tuple[Tensor, ...]) -> None:
        self.given = tuple(tensor.clone() for tensor in given)
        self._step = step  # a graph reads where its tensors were, and keeps none of them
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step(*self.given)

    def replay(self, given: tuple[Tensor, ...]) -> None:
        """Take the step of another number, on other views of the same shapes."""
        for own, other in zip(self.given, given, strict=True):
            own.copy_(other)
        self.graph.replay()


class CapturedSteps:
    """The steps of a trainer, each kind captured when it has been taken :data:`WARM_UP` times.

    Attributes:
        table: of the epoch under way.
    """

    table: StepTable

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forget what was captured: a step reads or writes other tensors from now on."""
        self._taken: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, CapturedStep] = {}
        self.table = StepTable(0, 0, self._device)

    def begin(self, steps: int, size: int) -> StepTable:
        """The table of an epoch of so many steps, with batches of ``size``: that of the one before, if it was of the same."""
        if (len(self.table.numbers), self.table.size) != (steps, size):
            self.restart()
            self.table = StepTable(steps, size, self._device)
        return self.table

    def take(self, step: Step, number: int, views: tuple[Tensor, ...], kind: Hashable) -> None:
        """Take a step, captured, replayed or neither.

        ``kind``: all that distinguishes ``step`` from others, the shapes of its views apart. Raises TrainingError where a step
        cannot be captured.
        """
        given = (self.table.numbers[number : number + 1], *views)
        kind = kind, tuple(view.shape for view in views)
        self._taken[kind] += 1
        if self._taken[kind] <= WARM_UP:
            return step(*given)
        if kind not in self._captured:
            try:
                self._captured[kind] = CapturedStep(step, given)
            except RuntimeError as error:
                raise TrainingError(
                    f"a step cannot be captured as a CUDA graph: {error}; go on without cuda_graphs, to the same bits (a run: "
                    "without --cuda-graphs, with --resume)"
                ) from error
        return self._captured[kind].replay(given)
