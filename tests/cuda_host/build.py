"""Compiles CUDA sources for the host, with g++ and no part of the CUDA toolkit."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = [HERE / f"{name}.cpp" for name in ("order", "clock", "threads", "memory", "hooks", "controls")]

# Strict aliasing is no rule of CUDA's. Unique symbols would be one in all builds that a process loads, __shared__ ones too.
# _FORTIFY_SOURCE, on by default in some distributions, forbids longjmp() from one fiber to another.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
# More than -O1 doubles the time to compile (it unrolls), less makes the kernels slow. A hook at each function's entry and exit
# would tell nothing.
KERNEL = ["-x", "c++", "-O1", "-fsanitize=thread,alignment,bounds", "--param=tsan-instrument-func-entry-exit=0"]
KERNEL += ["-Wno-unknown-pragmas", "-Wno-attributes"]
PLAIN = ["-O1"]
HARNESS = ["-O2"]


class BuildError(Exception):
    pass


def problem() -> str | None:
    """Why nothing can be built here."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "needs Linux and g++"
    if find_spec("pybind11") is None:
        return 'needs pybind11: pip install -e ".[test]"'
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs Python.h (Debian: apt-get install python3-dev)"
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    return None if "Free Software Foundation" in version else "g++ is another compiler here"


def _run(command: Sequence[str | Path], cwd: Path) -> bytes:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True)
    if done.returncode:
        raise BuildError(done.stderr.decode(errors="replace")[:4000])
    return done.stdout


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(source: Path, flags: Sequence[str], include: Sequence[Path], out: Path) -> Path:
    """The object file of a source, from the cache where its preprocessed text and the flags were seen before."""
    import pybind11  # where it is missing, problem() says so

    folders = [HERE / "include", *include, pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", *COMMON, *flags, *(f"-I{folder}" for folder in folders)]
    version = _run(["g++", "--version"], source.parent)
    text = _run([*command, "-E", source.name], source.parent)
    target = out / f"{source.stem}-{_hash(version, ' '.join([*COMMON, *flags]).encode(), text)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*command, "-c", source.name, "-o", partial], source.parent)
        partial.rename(target)
    return target


def build(
    sources: Sequence[Path], out: Path, include: Sequence[Path] = (), defines: Mapping[str, str] | None = None
) -> Path:
    """The Python extension `_cuda` made of the sources, .cu (instrumented) and .cpp (with PYBIND11_MODULE), and the harness.

    `out` holds the object files and libraries, by their contents. `include` is for sources patched in a folder of their own.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    macros = [f"-D{name}={value}" for name, value in (defines or {}).items()]
    # The harness first: of two copies of a standard template the linker keeps the first, and must not keep one that is
    # instrumented.
    work = dict.fromkeys(RUNTIME, HARNESS)
    work |= {source.absolute(): [*(KERNEL if source.suffix == ".cu" else PLAIN), *macros] for source in sources}
    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(lambda source: _compile(source, work[source], include, out), work)]
    folder = out / _hash(*(obj.name.encode() for obj in objects))
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        partial = folder / f"{os.getpid()}.tmp"
        _run(["g++", "-shared", *objects, "-o", partial], out)
        partial.rename(library)
    return library
