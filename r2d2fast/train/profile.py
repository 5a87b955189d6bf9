"""A trace of a few steps of each stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

# The first steps of a stage are not like the others: memory is allocated, kernels are chosen or compiled.
SKIPPED, TRACED = 3, 5


@contextmanager
def profiling(path: Path) -> Iterator[Callable[[], None]]:
    """Write a Chrome trace of some steps to ``path``; gives the function to call after each."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
