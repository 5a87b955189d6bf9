"""A build of CUDA sources, loaded: its Python module, and how its kernels run on the host.

    host = Host(build([Path("csrc/d2_cuda.cu"), Path("csrc/binding_cuda.cpp")], folder))
    with host.launches("reverse", buffers={"grad": grad}, constants={"logits": logits}) as report:
        host.module.step(logits.data_ptr(), grad.data_ptr(), ...)
    assert (report.reads("logits") == 1).all()

What a kernel does wrong (memory.h, threads.h) is a RuntimeError from its launch that names block, thread and address.
"""

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ORDERS = ("forward", "reverse", "permuted")


class _Record(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_uint64),
        ("operations", ctypes.c_uint64),
        ("launches", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("grid", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("cycles", ctypes.c_uint32),
        ("trips", ctypes.c_uint32),
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(rows, elements of a row, elements from row to row) of the memory that the tensor's elements lie in."""
    dims = sorted((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and step)
    row = 1
    while dims and dims[0][0] == row:
        row *= dims.pop(0)[1]
    if len(dims) > 1:
        raise ValueError(f"strides {tensor.stride()} of {tuple(tensor.shape)} are not rows")
    return (dims[0][1], row, dims[0][0]) if dims else (1, row, row)


class Report:
    """What the launches of one `with` did; counts are there after it, also where it ends in an exception."""

    def __init__(self) -> None:
        self.launches = 0
        self.grid = self.block = self.stream = self.device = 0  # of the last launch
        self.cycles = self.trips = self.operations = 0  # the clock's (clock.h), of the last launch
        self._counts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def reads(self, name: str) -> torch.Tensor:
        """How often each element was read, at most 65535. An atomic counts as a read and a write."""
        return self._counts[name][0]

    def writes(self, name: str) -> torch.Tensor:
        return self._counts[name][1]


class Host:
    def __init__(self, library: Path) -> None:
        # pybind11 keeps one module a name; only what follows the last dot is its own.
        spec = importlib.util.spec_from_file_location(f"{library.parent.name}._cuda", library)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(library))  # with what a build exports beside its module
        self.library.cuda_host_message.restype = ctypes.c_char_p

    def fail_next_launch(self, error: int) -> None:
        """Makes the next launch return this cudaError_t and do nothing."""
        self.library.cuda_host_fail_next_launch(error)

    def left_behind(self) -> tuple[int, int]:
        """The current device, and the cudaError_t that the next cudaGetLastError() would return, which this call takes away."""
        return self.library.cuda_host_current_device(), self.library.cuda_host_last_error()

    @contextmanager
    def launches(
        self,
        order: str = "forward",
        *,
        buffers: Mapping[str, torch.Tensor | None] | None = None,
        constants: Mapping[str, torch.Tensor | None] | None = None,
        seed: int = 0,
        checks: bool = True,
    ) -> Iterator[Report]:
        """Kernels launched in here run their threads and blocks in this order, and are watched: they may touch the tensors
        given and no others, write `buffers` only. Without checks only barriers, shuffles and votes are looked after.
        """
        given = {**(buffers or {}), **(constants or {})}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None and tensor.numel()}
        report, before, watched = Report(), self._record().launches, []
        try:
            for name in tensors if checks else ():
                self._add(name, tensors[name], constant=name in (constants or {}))
                watched.append(name)
            self.library.cuda_host_set(ORDERS.index(order), ctypes.c_uint64(seed), int(checks))
            yield report
        finally:
            record = self._record()
            report.launches = record.launches - before
            report.grid, report.block = record.grid, record.block
            report.stream, report.device = record.stream, record.device
            report.cycles, report.trips, report.operations = record.cycles, record.trips, record.operations
            for name in watched:
                report._counts[name] = self._counts(name, tensors[name])
            self.library.cuda_host_remove_buffers()
            self.library.cuda_host_set(0, ctypes.c_uint64(0), 0)

    def _record(self) -> _Record:
        record = _Record()
        self.library.cuda_host_record(ctypes.byref(record))
        return record

    def _add(self, name: str, tensor: torch.Tensor, constant: bool) -> None:
        rows, row, step = _extent(tensor)
        size = tensor.element_size()
        sizes = [ctypes.c_uint64(n) for n in (tensor.data_ptr(), rows, row * size, step * size, size)]
        if self.library.cuda_host_add_buffer(name.encode(), *sizes, int(constant)):
            raise ValueError(self.library.cuda_host_message().decode())

    def _counts(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, row, step = _extent(tensor)
        reads, writes = torch.zeros(2, (rows - 1) * step + row, dtype=torch.int32).unbind()
        self.library.cuda_host_read_counts(
            name.encode(),
            ctypes.c_uint64(reads.numel()),
            ctypes.c_void_p(reads.data_ptr()),
            ctypes.c_void_p(writes.data_ptr()),
        )
        return reads.as_strided(tensor.shape, tensor.stride()), writes.as_strided(tensor.shape, tensor.stride())
