"""Which samples each process owns the pseudo-logits of, for loops on several: a sampler and a bank that belong together."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import Sampler

from r2d2fast import BankError, PseudoLabelBank, reference
from r2d2fast.data.order import BatchSampler, mixed_steps


class Partition:
    """The unlabelled samples are dealt to the ranks, anew at each prediction; a rank owns the bank's rows of its own ones.

    To its bank a sample is known by a local number: the unlabelled ones of this rank first, in the order of the rows, then all
    labelled ones.

    Args:
        labels: int64 ``[M]``, on the CPU; −1 for an unlabelled sample.
        sampler: with the labelled and unlabelled samples of the run; it deals the latter.
        device: of this process.

    Attributes:
        prediction: the number of the prediction from which on the samples are dealt like this.
        samples: int64 ``[R]``, on the CPU: row i of this rank's bank is that of sample ``samples[i]``.
        local: int64 ``[M]``, on the device: the local number of each sample, −1 for one that another rank owns.
    """

    prediction: int
    samples: Tensor
    local: Tensor

    def __init__(self, labels: Tensor, sampler: BatchSampler, device: torch.device) -> None:
        self.labels = labels
        self.sampler = sampler
        self.device = device
        self.deal(0)

    def deal(self, prediction: int) -> None:
        """Deal the samples as from the prediction with this number on: that of the epoch which begins with it."""
        self.prediction = prediction
        self.samples = self.sampler.partition(prediction)[self.sampler.rank]
        numbered = torch.cat([self.samples, self.sampler.labelled])
        local = torch.full((len(self.labels),), -1)
        local[numbered] = torch.arange(len(numbered))
        self.local = local.to(self.device)

    def bank_labels(self) -> Tensor:
        """int64 ``[R + L]``, on the CPU: the labels by local number, as this rank's bank is made of them."""
        return self.labels[torch.cat([self.samples, self.sampler.labelled])]

    def hard_labels(self, bank: PseudoLabelBank) -> Tensor:
        """int64 ``[M]``, the same on every rank: ground truth where there is any, argmax of the pseudo-label elsewhere.

        ``bank``: this rank's.
        """
        labels = torch.zeros(len(self.labels), dtype=torch.int64, device=self.device)
        labels[self.samples.to(labels.device)] = bank.pseudo_logits.argmax(1)
        return self._with_labelled(labels, self.labels[self.sampler.labelled].to(labels.device))

    def _with_labelled(self, values: Tensor, of_labelled: Tensor | float) -> Tensor:
        """Of all ranks: ``values`` of the unlabelled samples, zero where they are not this rank's, and those of labelled ones."""
        self._sum_(values)
        values[self.sampler.labelled.to(values.device)] = of_labelled
        return values

    def _sum_(self, values: Tensor) -> None:
        """In place the sum over all ranks."""
        if self.sampler.ranks > 1:
            dist.all_reduce(values)


class ShardedBatchSampler(Sampler[list[int]]):
    """The batches of one process for stage 2, of samples whose pseudo-labels it owns: unlabelled ones, then labelled ones.

    A ``batch_sampler`` for a DataLoader. An epoch is a pass over the unlabelled samples, in an order that depends on the seed and
    the epoch; what does not fill a batch is left out of it. Frameworks that shard a loader's batches by themselves must not do it
    again (Lightning: ``use_distributed_sampler=False``; Accelerate: do not ``prepare`` this loader).

    Args:
        labels: as of :class:`r2d2fast.PseudoLabelBank`: ``[M]`` integers, −1 for an unlabelled sample.
        batch_size: unlabelled samples in a batch of one process.
        labelled_batch_size: labelled ones after them.
        seed: of all orders; the same on every process.
        rank, ranks: which process this is, of how many; default those of ``torch.distributed``.

    Raises:
        ValueError: not one batch can be made, or sizes and ranks have no meaning.
    """

    def __init__(
        self,
        labels: Any,
        batch_size: int,
        labelled_batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        ranks = ranks if ranks is not None else dist.get_world_size() if joined else 1
        rank = rank if rank is not None else dist.get_rank() if joined else 0
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank} of {ranks} processes; it must be 0 … {ranks - 1}")
        classes = torch.as_tensor(labels).cpu().long()
        labelled, unlabelled = (classes >= 0).nonzero()[:, 0], (classes < 0).nonzero()[:, 0]
        for name, size, available in (
            ("batch_size", batch_size, len(unlabelled)),
            ("labelled_batch_size", labelled_batch_size, len(labelled)),
        ):
            if size < (name == "batch_size") or (size and not available):
                kind = "unlabelled" if name == "batch_size" else "labelled"
                raise ValueError(
                    f"{name} is {size}, of {available} {kind} samples; it must be positive, or 0 labelled ones"
                )
        self._sizes = batch_size * ranks, labelled_batch_size * ranks
        if not mixed_steps(len(unlabelled), self._sizes[0], ranks):
            raise ValueError(
                f"batch_size {batch_size} on each of {ranks} processes: {len(unlabelled)} unlabelled samples fill not one batch"
            )
        order = BatchSampler(labelled, unlabelled, seed, rank, ranks)
        self.partition = Partition(classes, order, torch.device("cpu"))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next, as of ``DistributedSampler``."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, the same number on every process."""
        order = self.partition.sampler
        return mixed_steps(len(order.unlabelled), self._sizes[0], order.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.partition.sampler
        for batch in order.mixed(self._sizes, self.epoch, self.epoch, self.partition.prediction):
            yield batch.samples.tolist()


class ShardedPseudoLabelBank(PseudoLabelBank):
    """The rows of those unlabelled samples that this process owns; losses, predictions and queries take the data set's numbers.

    So a bank costs each process its share of the memory, and nothing of it crosses the network. Under a loss D_u is by default
    the global batch, the batch of this process times the number of them. All processes must call ``state_dict()``; any number of
    processes can load what it returns.

    Args:
        sampler: of the batches; it deals the samples.
        num_classes: N.
        full_state_dict: whether ``state_dict()`` has the rows of all processes on each, as Lightning, Accelerate, Transformers
            and ``torch.save`` need them, which write what one process has. Without it they are a DTensor, of which each process
            has its own: for ``torch.distributed.checkpoint`` alone, and for banks that would not fit.
        options: the further arguments of :class:`PseudoLabelBank`.

    Example:
        >>> sampler = ShardedBatchSampler(labels, batch_size=384, labelled_batch_size=128)
        >>> bank = ShardedPseudoLabelBank(sampler, num_classes=10, device=device)
        >>> loader = DataLoader(with_index(dataset), batch_sampler=sampler)
        >>> own = bank.repartition(epoch)                                      # before the first epoch, and at each reprediction
        >>> for images, index in DataLoader(Subset(with_index(dataset), own), 512):
        ...     bank.predict_(index, model(images))
        >>> sampler.set_epoch(epoch)
        >>> for images, index in loader:
        ...     loss = criterion(model(images), index)
    """

    def __init__(
        self, sampler: ShardedBatchSampler, num_classes: int, full_state_dict: bool = True, **options: Any
    ) -> None:
        self.full_state_dict = full_state_dict
        self.partition = sampler.partition
        super().__init__(self.partition.bank_labels(), num_classes, **options)
        self.sharded = True
        self.ranks = self.partition.sampler.ranks
        self._mesh: DeviceMesh | None = None
        self._follow()

    def __len__(self) -> int:
        """M, the number of samples in the data set."""
        return len(self.partition.labels)

    def repartition(self, epoch: int) -> list[int]:
        """Deal the samples to the processes anew, before the (re)prediction at ``epoch``; call it on all of them.

        All rows become zero, since they would be other samples' now. Returns the numbers of those that are this process's,
        which :meth:`predict_` should set next.
        """
        self.partition.deal(epoch)
        self.pseudo_logits.zero_()
        return self.partition.samples.tolist()

    def localize(self, index: Tensor) -> Tensor:
        local = self.partition.local
        known = (index >= 0) & (index < len(local))
        numbers = local[index.where(known, 0)].where(known, -1)
        if index.is_cpu and not torch.compiler.is_compiling():
            for position in (numbers < 0).nonzero()[:1, 0].tolist():
                if not known[position]:
                    raise IndexError(reference.out_of_range(int(index[position]), position, len(local)))
                raise IndexError(
                    f"index[{position}] is sample {int(index[position])}, whose pseudo-label another process owns. Nothing was "
                    "written. Draw batches from the ShardedBatchSampler that this bank was made of"
                )
        return numbers

    def hard_labels(self) -> Tensor:
        """int64 ``[M]``, as of :class:`PseudoLabelBank`, of the samples of all processes, all of which must call it."""
        return self.partition.hard_labels(self)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ShardedPseudoLabelBank":
        super().to(device, dtype)
        self._follow()
        return self

    def _follow(self) -> None:
        self.partition.device = self.device
        self.partition.local = self.partition.local.to(self.device)

    def _sample_of(self, row: int) -> int:
        return int(self.partition.samples[row])

    def state_dict(self) -> dict[str, Any]:
        """The rows of all processes, in the order in which the samples were dealt; as of :class:`PseudoLabelBank`."""
        rows = self._all_rows()
        if self.full_state_dict and isinstance(rows, DTensor):
            rows = rows.full_tensor()
        return super().state_dict() | {
            "pseudo_logits": rows,
            "slots": self._all_slots(self.partition.prediction).to(self.device),
            "prediction": self.partition.prediction,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, of any number of processes; samples are dealt as it says. All processes must call it.

        Raises BankError, with nothing changed, if it is of other samples, classes or seed.
        """
        if "prediction" not in state:
            raise BankError("the state is no sharded bank's; pass what ShardedPseudoLabelBank.state_dict() returned")
        slots = self._all_slots(state["prediction"])
        if not torch.equal(state["slots"].cpu(), slots):
            raise BankError(
                "the state was saved for other labels or another seed; make the sampler from those of that run"
            )
        rows = state["pseudo_logits"]
        if isinstance(rows, DTensor) and rows.device_mesh.size() != self.ranks:
            raise BankError(f"the state's rows are on {rows.device_mesh.size()} processes, and these are {self.ranks}")
        if isinstance(rows, DTensor):
            rows = rows.to_local()
        else:
            order = self.partition.sampler
            first = sum(map(len, order.partition(state["prediction"])[: order.rank]))
            rows = rows[first : first + len(self.pseudo_logits)]
        super().load_state_dict({**state, "pseudo_logits": rows, "slots": self.slots})
        self.partition.deal(state["prediction"])

    def _all_rows(self) -> Tensor:
        if self.ranks == 1:
            return self.pseudo_logits
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.ranks,))
        shape = torch.Size((len(self.partition.sampler.unlabelled), self.num_classes))
        return DTensor.from_local(
            self.pseudo_logits, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.num_classes, 1)
        )

    def _all_slots(self, prediction: int) -> Tensor:
        """int32 ``[M]``, on the CPU: the rows that the samples would have in one bank of all."""
        order = self.partition.sampler
        slots = (-1 - self.partition.labels).int()
        slots[torch.cat(order.partition(prediction))] = torch.arange(len(order.unlabelled), dtype=torch.int32)
        return slots
