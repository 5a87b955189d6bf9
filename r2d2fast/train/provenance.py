"""Where a run was done and by which code: no figure means anything without it."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import r2d2fast
from r2d2fast.doctor.environment import cpu_model
from r2d2fast.train.ranks import Ranks


def machine(ranks: Ranks, threads: int) -> dict[str, Any]:
    """Names and numbers for ``results.json``: of the machine that ends the run, which others may have begun."""
    cuda = ranks.device.type == "cuda"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu_model()}, {os.cpu_count()} logical CPUs",
        "gpu": torch.cuda.get_device_name(ranks.device) if cuda else None,
        "processes": ranks.count,
        "threads": threads,
    }


def versions() -> dict[str, str | None]:
    """Versions for ``results.json``; ``commit`` is None where the package is not in a git checkout of its own."""
    return {
        "r2d2fast": r2d2fast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str | None:
    # Installed into a project that is itself a checkout, the package is not among its files.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(Path(r2d2fast.__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
