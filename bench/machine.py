"""Where and when a measurement was taken: no figure means anything without it."""

import os
import platform
from datetime import datetime
from pathlib import Path

import torch

from r2d2fast import backends


def describe() -> dict[str, str]:
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} logical CPUs",
        "r2d2fast cpu backend": backends()["cpu"].detail,
        "torch": f"{torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "load average at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
