"""Time, bytes and kernels of a step, beside a copy of as many bytes on the same device."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from r2d2fast import PseudoLabelBank, d2_step

_SHAPES = {
    "cpu": ((1024, 1000), (512, 10), (64, 21_841)),
    "cuda": ((16_384, 1000), (1024, 1000), (512, 10), (512, 21_841)),
}
_QUICK_SHAPE = {"cpu": (256, 1000), "cuda": (4096, 1000)}
_POOL_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of the bank, of the logits to cycle through and of the memory to copy: well beyond the caches."""
_SAMPLE_SECONDS = 5e-3
_CALLS_PROFILED = 5


@dataclass(frozen=True)
class Speed:
    """One backend's step at one shape.

    Attributes:
        bytes: what a step must move: logits and rows read, gradient and rows written.
        seconds: of one step, the median, as a Python loop sees it.
        copy_seconds: of a copy that reads half of these bytes and writes half, the median.
        copy_fraction: the copy's time as a share of the step's, the median over the rounds.
        kernels: GPU kernels, copies and fills of one step; None where they cannot be counted.
        kernel_seconds: GPU time of one step.
        kernels_note: the names of the kernels, or why they cannot be counted.
    """

    backend: str
    device: str
    batch: int
    classes: int
    dtype: str
    bytes: int
    seconds: float
    copy_seconds: float
    copy_fraction: float
    kernels: float | None
    kernel_seconds: float | None
    kernels_note: str

    @property
    def gb_per_second(self) -> float:
        return self.bytes / self.seconds * 1e-9


def workloads(device: torch.device, quick: bool) -> Iterator[tuple[tuple[int, int], torch.dtype]]:
    """The shapes ``(B, N)`` and dtypes to be timed."""
    if quick:
        yield _QUICK_SHAPE[device.type], torch.float32
    else:
        yield from itertools.product(_SHAPES[device.type], (torch.float32, torch.bfloat16))


def measure(backend: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, quick: bool) -> Speed:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        step = _stepper(backend, device, shape, dtype, quick)
        size = 4 * shape[0] * shape[1] * dtype.itemsize
        copy = _copier(device, size, quick)
        ours: list[float] = []
        theirs: list[float] = []
        calls = [_calls(step, device), _calls(copy, device)]
        until = time.perf_counter() + (0.3 if quick else 2.0)
        while len(ours) < 3 or time.perf_counter() < until:  # in turn: a busy machine slows both
            ours.append(_seconds(step, calls[0], device))
            theirs.append(_seconds(copy, calls[1], device))
        kernels, kernel_seconds, note = count_kernels(step, device)
    return Speed(
        backend,
        str(device),
        *shape,
        str(dtype).removeprefix("torch."),
        size,
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(copy / step for copy, step in zip(theirs, ours, strict=True)),
        kernels,
        kernel_seconds,
        note,
    )


def count_kernels(step: Callable[[], object], device: torch.device) -> tuple[float | None, float | None, str]:
    """(GPU operations a call, their seconds, their names), or (None, None, why not)."""
    if device.type != "cuda":
        return None, None, "no GPU"
    try:
        for _ in range(2):  # the first profile starts the profiler's own machinery, and may miss kernels
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                for _ in range(_CALLS_PROFILED):
                    step()
                torch.cuda.synchronize(device)
        found = [event for event in profiled.events() or () if event.device_type == DeviceType.CUDA]
    except RuntimeError as error:
        return None, None, f"the profiler does not work here: {error}"
    if not found:
        return None, None, "the profiler saw no kernel (no permission to use the GPU's counters?)"
    seconds = sum(event.time_range.elapsed_us() for event in found) * 1e-6
    names = ", ".join(sorted({event.name[:100] for event in found}))
    return len(found) / _CALLS_PROFILED, seconds / _CALLS_PROFILED, names


def _stepper(
    backend: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, quick: bool
) -> Callable[[], object]:
    """A step that takes other logits and rows each time, so that they are in no cache."""
    batch, classes = shape
    pool = _pool_bytes(device, quick)
    rows = max(pool // (2 * classes * dtype.itemsize), 2 * batch)
    bank = PseudoLabelBank(torch.full((rows,), -1), classes, dtype=dtype, device=device)
    bank.pseudo_logits.normal_()
    count = max(2, min(64, rows // batch, pool // (4 * batch * classes * dtype.itemsize)))
    logits = torch.randn(count, batch, classes, device=device, dtype=dtype)
    batches = torch.randperm(rows, device=device)[: count * batch].view(count, batch)
    following: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(zip(logits, batches, strict=True))

    def step() -> object:
        return d2_step(*next(following), bank, backend=backend)

    return step


def _copier(device: torch.device, size: int, quick: bool) -> Callable[[], object]:
    count = max(2, min(64, _pool_bytes(device, quick) // size))
    source, target = (torch.ones(count, size // 8, device=device) for _ in range(2))
    following = itertools.cycle(zip(target, source, strict=True))

    def copy() -> object:
        to, what = next(following)
        return to.copy_(what)

    return copy


def _pool_bytes(device: torch.device, quick: bool) -> int:
    pool = _POOL_BYTES[device.type] // (4 if quick else 1)
    return min(pool, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else pool


def _calls(call: Callable[[], object], device: torch.device) -> int:
    """How many calls make a timed sample; finding it out warms the call up as well."""
    fastest = min(_seconds(call, 1, device) for _ in range(8))
    return max(1, min(1000, int(_SAMPLE_SECONDS / fastest)))


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls
