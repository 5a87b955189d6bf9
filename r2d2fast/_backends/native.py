"""Native code: its one loader, and the tuples by which both modules take a bank and a batch.

"Not built" and "built, but broken" are different messages.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

# PyTorch first: its libgomp then serves the extension too, which so shares PyTorch's pool of threads.
import torch
from torch import Tensor

from r2d2fast._backends.common import DTYPES
from r2d2fast.reference import Bank


class Library(NamedTuple):
    module: ModuleType | None
    problem: str | None


def _load(name: str, what: str, needs: str) -> Library:
    rebuild = f"run `pip install -e .` again in the r2d2fast checkout, with {needs}"
    if importlib.util.find_spec(f"r2d2fast.{name}") is None:
        return Library(None, f"{what} were not built; {rebuild}")
    try:
        return Library(importlib.import_module(f"r2d2fast.{name}"), None)
    except ImportError as error:
        return Library(None, f"{what} were built, but do not load ({error}); {rebuild}")


cpu = _load("_C", "the C++ kernels", "a C++17 compiler, GCC or Clang, installed")
cuda = _load(
    "_cuda", "the CUDA kernels", "nvcc of CUDA 12.4 or later on PATH (R2D2FAST_CUDA=1 makes its absence an error)"
)


def bank_handle(bank: Bank) -> tuple[Any, ...]:
    """The bank as ``csrc/binding.h`` takes it."""
    rows, slots = bank.pseudo_logits, bank.slots
    return (
        rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), slots.data_ptr(), slots.shape[0], rows.shape[1],
        bank.label_scale, bank.rounding == "stochastic", bank.seed, bank.updates.data_ptr(), bank.status.data_ptr(),
    )  # fmt: skip


def batch_handle(logits: Tensor, index: Tensor) -> tuple[int, tuple[Any, ...], Tensor, Tensor]:
    """The batch's size, the batch as ``csrc/binding.h`` takes it, and the tensors that must outlive a launch: the stream's memory
    pool may reuse theirs after it."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if not index.is_contiguous():
        index = index.contiguous()
    size = logits.shape[0]
    batch = (
        logits.data_ptr(), DTYPES[logits.dtype], size, logits.stride(0), index.data_ptr(), index.dtype == torch.int64
    )  # fmt: skip
    return size, batch, logits, index
