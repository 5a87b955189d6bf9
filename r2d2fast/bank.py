"""The bank: one row of learned pseudo-logits ỹ for every unlabelled sample."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from r2d2fast import reference
from r2d2fast._backends import choose
from r2d2fast._backends.checks import apart, check_batch, check_index
from r2d2fast._backends.common import DTYPES as KERNEL_DTYPES
from r2d2fast.errors import BankError
from r2d2fast.options import check_number
from r2d2fast.rounding import saturate

DTYPES = tuple(KERNEL_DTYPES)
ROUNDINGS = ("nearest", "stochastic")
_STICKY = {
    1: "an index outside [0, M)",
    2: "predictions that are not finite",
}
"""The bits of ``status[1]``."""
_START_ANEW = "the rows concerned were left as they were. Mend the cause, then load_state_dict() or make the bank anew"


class PseudoLabelBank(reference.Bank):
    """Pseudo-logits ỹ of the unlabelled samples of a data set, and the labels of the others (paper, section 3).

    Not a parameter and not a module buffer: optimizers, weight decay and DDP must not touch it. A labelled sample owns no
    row; its pseudo-logits are ``label_scale``·onehot(label) and never change. Rows start at zero, that is, at uniform
    pseudo-labels, until :meth:`predict_` sets them. On a GPU, everything that uses one bank must be ordered: on one stream, or
    by events. A deep copy, or a bank out of a pickle, has ``storage="device"``, wherever the rows were that it copies.

    Args:
        labels: ``[M]``, a class number in ``[0, num_classes)`` or −1 for an unlabelled sample: a tensor, NumPy array or list of
            integers.
        num_classes: N, 2 … 262 144.
        label_scale: K, the pseudo-logit of a labelled sample's class (reference implementation: 10).
        dtype: of the rows: float32, bfloat16 or float16.
        device: where rows and labels live; default the device of ``labels``.
        storage: ``"device"``; ``"pinned"``, host memory that a GPU's kernels read and write directly, for banks larger than
            the GPU; or a path: a memory-mapped file for banks larger than memory (CPU only). The file is created, its
            space reserved; an existing one of exactly its size is taken to be this bank's and opened with its contents.
        rounding: of a 16-bit bank: ``"nearest"``, or ``"stochastic"`` so that steps below its resolution add up.
        seed: of stochastic rounding.

    Attributes:
        pseudo_logits: ``[U, N]``, the rows, in the order of the unlabelled samples.
        slots: int32 ``[M]``, the row number of an unlabelled sample, −1−label of a labelled one.
        updates: int64 ``[1]``, how many there have been so far: the counter of stochastic rounding.
        host_rows: of a pinned bank: the same memory as ``pseudo_logits``, as a tensor of the host; wait for the device before.
        sharded: whether this process has the rows of its own samples only (:class:`r2d2fast.ShardedPseudoLabelBank`).
        ranks: how many processes' batches D_u counts by default.
        status: int32 ``[2]``, for GPU kernels: blocks that have finished (0 between steps), and what went wrong (:meth:`check`).

    Raises:
        TypeError: labels or number of classes that are no integers.
        ValueError: labels out of range, or an argument outside the values above.
        BankError: the file cannot be made or has another size.
    """

    def __init__(
        self,
        labels: ArrayLike | Tensor,
        num_classes: int,
        label_scale: float = 10.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage: str | os.PathLike[str] = "device",
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__"):
            raise TypeError(f"num_classes is {num_classes!r}; pass an int")
        num_classes = int(num_classes)
        classes = _as_int64(labels)
        _check_labels(classes, num_classes)
        _check_rounding(dtype, rounding)
        check_number("label_scale", label_scale)
        if not 0 < label_scale < float("inf"):
            raise ValueError(
                f"label_scale is {label_scale}; it must be positive and finite (reference implementation: 10)"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must be 0 … 2^63 - 1")
        device = torch.device(classes.device if device is None else device)
        unlabelled = classes < 0
        rows = int(unlabelled.sum())
        slots = torch.where(unlabelled, unlabelled.cumsum(0) - 1, -1 - classes)
        self.num_classes = num_classes
        self.storage = storage if storage in ("device", "pinned") else Path(storage)
        self.host_rows: Tensor | None = None
        self.sharded = False
        self.ranks = 1
        self.warned_of_ranks = False
        if storage == "device":
            pseudo_logits = torch.zeros(rows, num_classes, dtype=dtype, device=device)
        elif storage == "pinned":
            pseudo_logits, self.host_rows = pinned_rows(rows, num_classes, dtype, device)
        else:
            pseudo_logits = _map_file(Path(storage), rows, num_classes, dtype, device)
        super().__init__(
            pseudo_logits,
            slots.to(device=device, dtype=torch.int32),
            updates=torch.zeros(1, dtype=torch.int64, device=device),
            status=torch.zeros(2, dtype=torch.int32, device=device),
            label_scale=float(label_scale),
            rounding=rounding,
            seed=seed,
        )

    def __len__(self) -> int:
        """M, the number of samples, labelled ones included."""
        return len(self.slots)

    def __getstate__(self) -> dict[str, Any]:
        """What :func:`copy.deepcopy` and pickle copy: neither puts the rows in a file or in pinned memory again."""
        return self.__dict__ | {"storage": "device", "host_rows": None}

    def __copy__(self) -> "PseudoLabelBank":
        """A shallow copy shares the rows, and so is where they are."""
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    def __repr__(self) -> str:
        rows, classes = self.pseudo_logits.shape
        where = self.device if self.storage == "device" else self.storage
        return (
            f"PseudoLabelBank({len(self)} samples, {rows} unlabelled x {classes} classes, "
            f"{self.dtype}, {self.nbytes / 2**20:.1f} MiB on {where}, rounding={self.rounding!r})"
        )

    @property
    def device(self) -> torch.device:
        return self.pseudo_logits.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pseudo_logits.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the rows: U·N times the size of an element."""
        return self.pseudo_logits.nbytes

    def localize(self, index: Tensor) -> Tensor:
        """What a step takes for the data set's sample numbers ``index`` ``[B]`` where the bank is ``sharded``."""
        return index

    def predict_(self, index: Tensor, logits: Tensor, backend: str = "auto") -> None:
        """(Re)prediction: set the rows of the unlabelled samples among ``index`` to ``logits`` (rounded to nearest).

        ``index`` int32 or int64 ``[B]``; ``logits`` ``[B, N]``, any float dtype. Labelled samples are skipped; of duplicates
        the last counts. Raises IndexError, with nothing written, for an index outside ``[0, M)``; ValueError where logits are
        not finite: those samples keep the rows they had, all others are set. The GPU kernels, for which the host does not
        wait, skip both kinds of rows, and :meth:`check` raises.
        """
        logits, numbers = logits.detach(), index
        check_batch(logits, index, self)
        if self.sharded:
            index = self.localize(index)
        skipped, first = choose(backend, logits, self.pseudo_logits).predict(self, index, apart(logits, self))
        torch.autograd.graph.increment_version(self.pseudo_logits)
        if skipped:
            raise ValueError(
                f"{skipped} of {len(index)} rows of logits are not finite, first for sample {int(numbers[first])}; "
                "these samples keep the pseudo-logits they had, the others are set. Has the network diverged?"
            )

    def logits(self, index: Tensor) -> Tensor:
        """Pseudo-logits ỹ of the samples ``index`` ``[B]``: float32 ``[B, N]``, K·onehot(label) for labelled ones."""
        check_index(index)
        if self.sharded:
            index = self.localize(index)
        slots = reference.lookup(index, self.slots)
        unlabelled = slots >= 0
        rows = torch.zeros(len(slots), self.num_classes, device=self.device)
        rows[unlabelled] = self.pseudo_logits[slots[unlabelled]].float()
        rows[~unlabelled, -1 - slots[~unlabelled]] = self.label_scale
        return rows

    def probs(self, index: Tensor) -> Tensor:
        """Pseudo-labels p̃ = softmax(ỹ) of the samples ``index`` ``[B]``: float32 ``[B, N]``."""
        return self.logits(index).softmax(1)

    def hard_labels(self) -> Tensor:
        """int64 ``[M]``: ground truth where a sample is labelled, argmax ỹ where it is not (paper, stage 3)."""
        labels = -1 - self.slots.long()
        labels[self.slots >= 0] = self.pseudo_logits.argmax(1)
        return labels

    def check(self) -> None:
        """Raise BankError if a GPU kernel met an index out of range or predictions that are not finite, at any time since the
        bank was made or loaded, or if a row is not finite (a damaged file, say), naming the first sample. Waits for the device
        and reads the whole bank."""
        unfinished, problems = self.status.tolist()
        if unfinished:
            raise BankError(
                f"a step of {self!r} was cut short, or two ran at once on different streams; load_state_dict() mends the counter"
            )
        met = [message for bit, message in _STICKY.items() if problems & bit]
        if met:
            raise BankError(f"{self!r} met {' and '.join(met)} since it was made or loaded; {_START_ANEW}")
        bad = [
            first + row for first, rows in self._pieces() for row in (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
        ]
        if bad:
            raise BankError(
                f"{len(bad)} rows of {self!r} are not finite, first that of sample {self._sample_of(bad[0])}; "
                "set them with predict_() or load a saved state"
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PseudoLabelBank":
        """Move the bank in place to a device and dtype; returns itself. One in pinned memory or a file stays what it is."""
        _check_rounding(self.dtype if dtype is None else dtype, self.rounding)
        target = torch.device(self.device if device is None else device)
        if target.type == self.device.type and target.index is None:
            target = self.device
        if self.storage != "device" and (target != self.device or dtype not in (None, self.dtype)):
            where = "pinned memory" if self.storage == "pinned" else self.storage
            raise BankError(
                f"the bank lives in {where} as {self.dtype}; make one with storage='device' to move or cast it"
            )
        if dtype not in (None, self.dtype):
            self.pseudo_logits = saturate(self.pseudo_logits, dtype)
        self.pseudo_logits = self.pseudo_logits.to(target)
        self.slots, self.updates, self.status = (
            tensor.to(target) for tensor in (self.slots, self.updates, self.status)
        )
        return self

    def _sample_of(self, row: int) -> int:
        return int((self.slots == row).nonzero()[0, 0])

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The rows in pieces and the number of the first of each: what is computed of a whole bank may be as large as it."""
        size = max(2**24 // self.num_classes, 1)
        for first in range(0, len(self.pseudo_logits), size):
            yield first, self.pseudo_logits[first : first + size]

    def state_dict(self) -> dict[str, Any]:
        """Rows, slot table and number of updates, as tensors that share memory with the bank, and its plain settings."""
        return {
            "pseudo_logits": self.pseudo_logits,
            "slots": self.slots,
            "updates": self.updates,
            "num_classes": self.num_classes,
            "label_scale": self.label_scale,
            "rounding": self.rounding,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a :meth:`state_dict` in. Raises BankError, with nothing changed, if it is of other samples or classes.

        ``rounding`` and ``seed`` are the state's where its rows have this bank's dtype; rows of another dtype are cast,
        and the bank goes on rounding as it was made to.
        """
        missing = sorted(PseudoLabelBank.state_dict(self).keys() - state.keys())
        if missing:
            raise BankError(f"the state lacks {', '.join(missing)}; pass what PseudoLabelBank.state_dict() returned")
        shape = tuple(state["pseudo_logits"].shape)
        if shape != tuple(self.pseudo_logits.shape):
            raise BankError(f"the state's rows are {shape}, this bank's {tuple(self.pseudo_logits.shape)}")
        if not torch.equal(state["slots"].to(self.device), self.slots):
            if "prediction" in state:
                raise BankError(
                    "the state is of a ShardedPseudoLabelBank, with the rows as its samples were dealt; make one of the "
                    "labels and seed of that run, which takes a state of any number of processes"
                )
            raise BankError(
                "the state was saved for other labels; make the bank from the labels of that run (same split)"
            )
        same_dtype = state["pseudo_logits"].dtype == self.dtype
        if same_dtype:
            _check_rounding(self.dtype, state["rounding"])
        for first, rows in self._pieces():
            rows.copy_(saturate(state["pseudo_logits"][first : first + len(rows)], self.dtype))
        self.updates.copy_(state["updates"])
        self.status.zero_()
        self.label_scale = state["label_scale"]
        if same_dtype:
            self.rounding, self.seed = state["rounding"], state["seed"]


def _check_rounding(dtype: torch.dtype, rounding: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(_unknown("dtype", dtype, DTYPES))
    if rounding not in ROUNDINGS:
        raise ValueError(_unknown("rounding", rounding, ROUNDINGS))
    if rounding == "stochastic" and dtype == torch.float32:
        raise ValueError("rounding 'stochastic' is for 16-bit banks; a float32 bank rounds to nearest")


def _as_int64(labels: ArrayLike | Tensor) -> Tensor:
    """Labels of any integer type as they are, on their device; TypeError for others."""
    if not isinstance(labels, Tensor):
        array = np.asarray(labels)
        if array.dtype.kind not in "iu":
            raise TypeError(f"labels are {array.dtype}; pass integers, -1 for an unlabelled sample")
        return torch.from_numpy(array.astype(np.int64))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}; pass integers, -1 for an unlabelled sample")
    return labels.long()


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if not 2 <= num_classes <= 262_144:
        raise ValueError(f"num_classes is {num_classes}; it must be 2 … 262144")
    if labels.dim() != 1:
        raise ValueError(f"labels are {list(labels.shape)}; pass [M], one label a sample")
    wrong = ((labels < -1) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0, 0])
        raise ValueError(
            f"labels[{first}] is {int(labels[first])} ({len(wrong)} such); "
            f"a label is 0 … {num_classes - 1}, or -1 for an unlabelled sample"
        )


def _unknown(name: str, value: object, accepted: tuple[object, ...]) -> str:
    return f"{name} is {value!r}; accepted: {', '.join(map(str, accepted))}"


class _DeviceView:
    """Pinned host memory as a CUDA array: with unified addressing a GPU reaches it at the host's own address."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # keeps the memory while PyTorch holds this object
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": f"<i{host.element_size()}",
            "data": (host.data_ptr(), False),
            "version": 2,
        }


def pinned_rows(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``[rows, classes]`` as a CUDA tensor whose memory is the host's, and the host's tensor. Each starts on a 128-byte
    line of its own, so that no line crosses the bus for two rows."""
    if device.type != "cuda" or not torch.cuda.is_available():
        reason = f"got device {str(device)!r}" if torch.cuda.is_available() else "PyTorch finds none here"
        raise ValueError(f"storage 'pinned' is for the kernels of a GPU, and {reason}; use 'device' or a path")
    line = 128 // dtype.itemsize
    with torch.cuda.device(device):  # the one that the memory is then said to belong to
        host = torch.zeros(max(rows, 1), -(-classes // line) * line, dtype=dtype, pin_memory=True)
    view = torch.as_tensor(_DeviceView(host), device=device)
    if view.data_ptr() != host.data_ptr():
        raise BankError(f"PyTorch copied the pinned rows to {device}; set that device before making the bank")
    return view.view(dtype)[:rows, :classes], host[:rows, :classes]


def _map_file(path: Path, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        raise ValueError(f"a memory-mapped bank ({path}) lives on the CPU; got device {device}")
    size = rows * classes * dtype.itemsize
    if path.exists():
        if path.stat().st_size != size:
            raise BankError(
                f"{path} has {path.stat().st_size} bytes, but {rows} rows x {classes} classes of {dtype} take {size}; "
                "it belongs to another bank: remove it or choose another path"
            )
    else:
        _reserve_file(path, size)
    return torch.from_file(str(path), shared=True, size=rows * classes, dtype=dtype).view(rows, classes)


def _reserve_file(path: Path, size: int) -> None:
    try:
        with open(path, "wb") as file:
            # Its space, too: a full disk is an error here and not a SIGBUS in the middle of training.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise BankError(
            f"cannot make the bank file {path} of {size} bytes: {error.strerror}; free space or choose another path"
        ) from error
