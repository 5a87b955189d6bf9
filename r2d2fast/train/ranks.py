"""The processes of a run: one, or those that torchrun has started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from r2d2fast.devices import find_device
from r2d2fast.train.errors import ConfigError, LostRankError, TrainingError

T = TypeVar("T")

# A rank waits so long for another: the longest that one may be alone is rank 0, while it evaluates nothing and draws pictures.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are; with one, nothing below communicates.

    Attributes:
        rank: 0 … ``count`` − 1; rank 0 writes files and the log.
        count: processes of the run.
        device: of this process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place the sum over all ranks."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked."""
        parts = [tensor] if self.count == 1 else [torch.empty_like(tensor) for _ in range(self.count)]
        if self.count > 1:
            dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def ungather(self, lines: list[list[float]]) -> Tensor:
        """This rank's line of what :meth:`gather` gave, float64, on the CPU; of another number of ranks rank 0's is the sum, and
        the others are zero."""
        saved = torch.tensor(lines, dtype=torch.float64)
        if len(saved) != self.count:
            saved = torch.cat([saved.sum(0, True), torch.zeros(self.count - 1, saved.shape[1])])
        return saved[self.rank]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank; the hosts wait for each other, the devices do not."""
        return bool(self._reduce(flag, dist.ReduceOp.MAX))

    def minimum(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return self._reduce(number, dist.ReduceOp.MIN)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._reduce(0, dist.ReduceOp.SUM)

    def _reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        if self.count == 1:
            return number
        tensor = torch.tensor(int(number))
        dist.all_reduce(tensor, op=operation)
        return int(tensor)

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or the TrainingError that it raises, on rank 0; on every rank."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except TrainingError as error:
                outcome[1] = error
        if self.count > 1:
            dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather_objects(self, value: T) -> list[T]:
        """The values, which can be pickled, of all ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def on_all(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on this rank, or on every rank the TrainingError of the first rank on which it raises one."""
        result, error = cast(T, None), cast(TrainingError | None, None)
        try:
            result = function()
        except TrainingError as raised:
            error = raised
        for first in filter(None, self.gather_objects(error)):
            raise first
        return result

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give all ranks rank 0's buffers (running statistics), as DistributedDataParallel does before a training step."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def shard(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """``rows``, this rank's part (as torch.chunk cuts) of a tensor ``shape``, as a checkpoint wants it."""
        if self.count == 1:
            return rows
        mesh = init_device_mesh(rows.device.type, (self.count,))
        return DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
        )

    def part(self, size: int) -> slice:
        """This rank's part of ``size`` things."""
        bounds = [size * rank // self.count for rank in range(self.count + 1)]
        return slice(bounds[self.rank], bounds[self.rank + 1])


def resolve_device(name: str) -> torch.device:
    """The device of ``--device``. Raises ConfigError for one that is not there."""
    if "LOCAL_RANK" in os.environ:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if ":" in name:
            raise ConfigError(f"--device {name}: under torchrun each process takes its own; accepted: cpu, cuda, auto")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            if processes > gpus:  # found by each process: one that has a GPU would wait for those that have none
                raise ConfigError(
                    f"--device cuda: {processes} processes and {gpus} GPUs on this machine; accepted: torchrun "
                    f"--nproc-per-node of at most {gpus}, or --device cpu"
                )
    try:
        return find_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def join_ranks(device_name: str) -> Iterator[Ranks]:
    """The ranks of this run, connected while the context lasts.

    Raises LostRankError where another one is lost, with how to go on.
    """
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device=device)
        return
    # Host tensors by gloo on every machine: what hosts agree on must not make a GPU wait.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    lost = False
    try:
        yield Ranks(dist.get_rank(), count, device)
    except (dist.DistError, RuntimeError) as error:
        # gloo reports a lost peer as a plain RuntimeError.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
        if not lost:
            raise
        raise LostRankError(
            f"rank {dist.get_rank()}: another of the {count} processes is gone ({str(error).splitlines()[0]}). "
            "The same torchrun command with --resume goes on from the last checkpoint, on any number of processes"
        ) from error
    finally:
        if not lost:  # NCCL would wait for the one that is gone
            dist.destroy_process_group()
