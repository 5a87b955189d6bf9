"""Whole steps of training as CUDA graphs: forward pass, loss, D2 step, backward pass and optimizer in one launch."""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.methods import METHODS
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks

WARM_UP = 3
"""So many steps of a kind are taken one operation at a time before the next is captured: in them kernels are loaded, libraries
choose their algorithms, and memory is allocated, none of which can be captured."""

Step = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Takes a step, of the views of a batch and its samples ``[B]``, and gives the loss, a scalar."""


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


class CapturedStep:
    """One kind of step as a CUDA graph, which reads its batch from memory of its own."""

    def __init__(self, step: Step, views: tuple[Tensor, ...], index: Tensor) -> None:
        self.views, self.index = tuple(view.clone() for view in views), index.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step(self.views, self.index)

    def replay(self, views: tuple[Tensor, ...], index: Tensor) -> Tensor:
        """Take the step on another batch of the same shapes. The loss is overwritten by the next one."""
        for own, given in zip((*self.views, self.index), (*views, index), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss


class CapturedSteps:
    """The steps of a trainer, each kind captured when it has been taken :data:`WARM_UP` times."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was captured: a step reads or writes other tensors from now on."""
        self._taken: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, CapturedStep] = {}

    def take(self, step: Step, views: tuple[Tensor, ...], index: Tensor, kind: Hashable) -> Tensor:
        """The loss of a step, captured, replayed or neither.

        ``kind``: all that distinguishes ``step`` from others, the shapes of its batch apart. Raises TrainingError where a step
        cannot be captured.
        """
        kind = kind, tuple(view.shape for view in views), index.shape
        self._taken[kind] += 1
        if self._taken[kind] <= WARM_UP:
            return step(views, index)
        if kind not in self._captured:
            try:
                self._captured[kind] = CapturedStep(step, views, index)
            except RuntimeError as error:
                raise TrainingError(
                    f"--cuda-graphs: the step cannot be captured: {error}; go on without the flag (--resume), to the same bits"
                ) from error
        return self._captured[kind].replay(views, index)
