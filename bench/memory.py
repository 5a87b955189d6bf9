"""What a step allocates: peak resident memory, which sees the scratch of native code and not only PyTorch's tensors."""

import re
import subprocess
import sys
from pathlib import Path

from bench.implementations import IMPLEMENTATIONS
from bench.workload import Workload

BATCH, CLASSES = 2048, 8000
"""65 MB a tensor: glibc maps blocks above 32 MB one by one, so nothing hides in memory that was freed before."""

_ROOT = Path(__file__).parent.parent


def step_memory(name: str) -> float:
    """Memory that the first step of an implementation adds, in tensors of size B x N: 1 is the gradient alone."""
    program = f"from bench.memory import grow; print(grow({name!r}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=_ROOT, check=True, capture_output=True, text=True)
    return float(result.stdout)


def grow(name: str) -> float:
    """Call it once in a fresh process, because the peak of a process never falls."""
    # A first step on a small workload, so that code is loaded and threads have started.
    small = Workload(2, 2, rows=2)
    IMPLEMENTATIONS[name].prepare(small)(next(small.indices))
    workload = Workload(BATCH, CLASSES, rows=BATCH)
    step = IMPLEMENTATIONS[name].prepare(workload)
    before = process_memory("VmRSS")
    step(next(workload.indices))
    return (process_memory("VmHWM") - before) / workload.logits.nbytes


def process_memory(field: str) -> int:
    """Bytes that this process has resident: now (VmRSS), at the peak (VmHWM), now and its own rather than a file's (RssAnon).

    The peak of getrusage would not do: it begins with that of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert kilobytes, f"/proc/self/status has no {field}"
    return int(kilobytes[1]) * 1024
