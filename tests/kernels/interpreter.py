"""Patches of Triton's interpreter, for tests: bfloat16 as GPUs round it, and a watch on what the kernels read and write."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle


@functools.cache
def patch_interpreter() -> None:
    _squeeze_numbers()
    _round_bfloat16_to_nearest()
    _patch_the_language_once_a_launch()
    _stay_inside_the_tensors()


def _squeeze_numbers() -> None:
    """Triton 3.6 makes numbers of arrays with one element, which NumPy 2.4 refuses; later versions squeeze them first."""
    theirs = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        theirs(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _round_bfloat16_to_nearest() -> None:
    """The interpreter cuts float32 off to bfloat16, where the hardware rounds to nearest even."""
    theirs = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return theirs(self, src, dst_type)
        word = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl


class Accesses:
    """The addresses that launches have read and written, element by element."""

    def __init__(self) -> None:
        self._addresses: dict[str, list[np.ndarray]] = {"reads": [], "writes": []}

    def add(self, kind: str, addresses: np.ndarray) -> None:
        self._addresses[kind].append(addresses)

    def reads(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each element was read; for tensors that are still alive."""
        return self._count("reads", tensor)

    def writes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._count("writes", tensor)

    def _count(self, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        first, end = _extent(tensor)
        addresses = np.concatenate([*self._addresses[kind], np.empty(0, np.uint64)]).astype(np.int64)
        inside = addresses[(addresses >= first) & (addresses < end)]
        counts = np.bincount((inside - first) // tensor.itemsize, minlength=(end - first) // tensor.itemsize)
        return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())


_observers: list[Accesses] = []


@contextmanager
def observed() -> Iterator[Accesses]:
    accesses = Accesses()
    _observers.append(accesses)
    try:
        yield accesses
    finally:
        _observers.remove(accesses)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its first element begins, and where its last one ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + size


def _stay_inside_the_tensors() -> None:
    """On a GPU most of what is read or written beside a tensor goes unnoticed, and here it may end the process."""
    extents: list[tuple[int, int]] = []
    launch = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def call_kernel(self, *args, **options):
        extents[:] = [_extent(argument) for argument in args if isinstance(argument, torch.Tensor)]
        return launch(self, *args, **options)

    def check(kind, pointers, mask):
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, end = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            inside = any(begin <= first and end <= stop for begin, stop in extents)
            assert inside, f"{kind} memory that is of no tensor of the launch"
        for accesses in _observers:
            accesses.add(kind, addresses.ravel())

    def create_masked_load(self, pointers, mask, *rest):
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    GridExecutor.__call__ = call_kernel
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _patch_the_language_once_a_launch() -> None:
    """The interpreter does it, by inspection, at each call of a device function: half of its time."""
    patched: set[object] = set()
    launch = GridExecutor.__call__

    def call_kernel(self, *args, **options):
        patched.clear()
        with np.errstate(all="ignore"):  # rows beyond the batch: inf - inf, 0 / 0
            return launch(self, *args, **options)

    def call_device_function(self, *args, **options):
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **options)

    GridExecutor.__call__ = call_kernel
    InterpretedFunction.__call__ = call_device_function
