"""The hardware and the versions that a figure was measured with: for the results of runs, the doctor and the benchmarks."""

import importlib
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import r2d2fast
from r2d2fast._backends import native
from r2d2fast.cuda_toolkit import find_cuda_tool

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def describe_run(device: torch.device, processes: int) -> dict[str, Any]:
    """The machine for ``results.json``: the one that ends the run, which others may have begun."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Versions for ``results.json``; ``commit`` is None where the package is not in a git checkout of its own."""
    return {
        "r2d2fast": r2d2fast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe() -> dict[str, Any]:
    """What a reader needs to know to make sense of a time, as plain values for JSON."""
    sets = ", ".join(native.cpu.module.instruction_sets()) if native.cpu.module else "kernels not built"
    variables = [name for name in os.environ if name in _VARIABLES or name.startswith("R2D2FAST_")]
    return {
        "r2d2fast": f"{r2d2fast.__version__} in {Path(r2d2fast.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}",
        "torch": _torch(),
        "cpu": f"{_cpu()}, {torch.get_num_threads()} threads used; kernels for: {sets}; "
        f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in sorted(variables)},
        "load_average": load_average(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_toolchain() -> dict[str, str]:
    """What backends are built with and run on; a thing that is not there is a sentence that says so."""
    return {"triton": _triton(), "gpu_driver": _driver(), "nvcc": _nvcc(), "compiler": _compiler()}


def as_text(description: Mapping[str, Any]) -> dict[str, str]:
    """A description with every value as a string, which may have several lines."""
    text = {name: str(value) for name, value in description.items()}
    if "gpus" in description:
        gpus = (
            f"{gpu['device']}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, {gpu['architecture']}, "
            f"{gpu['multiprocessors']} multiprocessors"
            for gpu in description["gpus"]
        )
        text["gpus"] = "\n".join(gpus) or "none found by PyTorch"
    if "variables" in description:
        settings = (f"{name}={value}" for name, value in description["variables"].items())
        text["variables"] = ", ".join(settings) or "none set that matter here"
    return text


def load_average() -> str:
    """Processes that wanted a core in the last 1, 5 and 15 minutes: figures of a busy machine are not those of a free one."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "not known"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical CPUs"


def _gpus() -> list[dict[str, Any]]:
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "architecture": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _torch() -> str:
    if torch.version.hip:
        built = f"built with HIP {torch.version.hip}"
    elif torch.version.cuda:
        built = f"built with CUDA {torch.version.cuda}"
    else:
        built = "built for CPUs only"
    return f"{torch.__version__}, {built}"


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation raises anything
        return f"does not import ({error})" if not isinstance(error, ModuleNotFoundError) else "not installed"


def _driver() -> str:
    if torch.version.hip:
        return _first_line("rocm-smi", "--showdriverversion") or "rocm-smi not found"
    if torch.version.cuda is None:
        return "not used: this PyTorch is built for CPUs only"
    version = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        return version or "nvidia-smi not found"
    return f"PyTorch finds no GPU ({f'driver {version}' if version else 'no NVIDIA driver: nvidia-smi not found or failing'})"


def _nvcc() -> str:
    nvcc = find_cuda_tool("nvcc")
    release = _first_line(nvcc, "--version", containing="release") if nvcc else ""
    if not release:
        return "not found (needed only to build the cuda backend)"
    return f"{release.partition('release')[2].split(',')[0].strip()} in {nvcc}"


def _compiler() -> str:
    configured = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "").split()
    for name in (*configured[:1], "c++", "g++", "clang++"):
        if version := _first_line(name, "--version"):
            return version
    return "not found (needed only to build the cpu backend)"


def _commit() -> str | None:
    package = str(Path(r2d2fast.__file__).parent)
    git = ("git", "--no-optional-locks", "-C", package)
    # Installed into a project that is itself a checkout, the package is not among its files.
    if not _first_line(*git, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    return _first_line(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None


def _first_line(*command: str, containing: str = "") -> str:
    """The first line of a program's output (that contains something), "" where the program is missing or fails."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((line.strip() for line in output.splitlines() if line.strip() and containing in line), "")
