"""What is installed: whatever a backend needs, and what a reader needs to know to make sense of a figure."""

import importlib
import os
import platform
import subprocess
import sys
import sysconfig
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import r2d2fast
from r2d2fast._backends import native
from r2d2fast.cuda_toolkit import find_cuda_tool

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def describe() -> dict[str, Any]:
    """Plain values for JSON; a thing that is not there is a sentence that says so."""
    here = Path(r2d2fast.__file__).parent
    variables = [name for name in os.environ if name in _VARIABLES or name.startswith("R2D2FAST_")]
    return {
        "r2d2fast": f"{r2d2fast.__version__} in {here}",
        "python": f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}",
        "torch": _torch(),
        "triton": _triton(),
        "cpu": _cpu(),
        "gpu_driver": _driver(),
        "gpus": gpus(),
        "nvcc": _nvcc(),
        "compiler": _compiler(),
        "variables": {name: os.environ[name] for name in sorted(variables)},
        "load_average": " ".join(f"{load:.1f}" for load in os.getloadavg())
        if hasattr(os, "getloadavg")
        else "not known",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def gpus() -> list[dict[str, Any]]:
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


def _cpu() -> str:
    sets = ", ".join(native.cpu.module.instruction_sets()) if native.cpu.module else "kernels not built"
    return (
        f"{cpu_model()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads used; "
        f"kernels for: {sets}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    )


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


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
    place = find_cuda_tool("nvcc")
    if place is not None and (release := _first_line(place, "--version", containing="release")):
        return f"{release.partition('release')[2].split(',')[0].strip()} in {place}"
    return "not found (needed only to build the cuda backend)"


def _compiler() -> str:
    configured = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "").split()
    for name in (*configured[:1], "c++", "g++", "clang++"):
        if version := _first_line(name, "--version"):
            return version
    return "not found (needed only to build the cpu backend)"


def _first_line(*command: str, containing: str = "") -> str:
    """The first line of a program's output (that contains something), "" where the program is missing or fails."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((line.strip() for line in output.splitlines() if line.strip() and containing in line), "")
