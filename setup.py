"""Builds r2d2fast._C, the C++ kernels, and r2d2fast._cuda, the CUDA kernels; everything else is in pyproject.toml.

The extensions include no PyTorch header, so that they build under build isolation, for any torch version.
Without a working compiler, or pybind11, the package installs as pure Python, without nvcc as C++ alone: it says so here, which
pip shows with -v, in r2d2fast.backends(), and at the first step.

R2D2FAST_CUDA: auto (the default: build the CUDA kernels if nvcc is found), 0 (leave them out), 1 (fail without them).
R2D2FAST_CUDA_ARCHS: compute capabilities to build for, such as "80;90"; default those of the GPUs of this machine, and where
there is none 80, 90 and 100. PTX of the last serves later GPUs.
"""

import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # --no-build-isolation on a machine without it
    Pybind11Extension = None

# -ffp-contract: a·b + c in one rounding wherever the machine has it. GCC 12 warns about its own AVX-512 header (PR 105593).
FLAGS = [
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]
INSTRUCTION_SETS = {
    "csrc/d2_cpu_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/d2_cpu_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
SOURCES = ["csrc/binding.cpp", "csrc/d2_cpu.cpp", "csrc/dispatch.cpp", "csrc/d2_cpu_portable.cpp"]
HEADERS = [str(path) for path in Path("csrc").glob("*.h")]
OLDEST_ARCH = 75


class BuildExtension(build_ext):
    """Gives each file the flags of its instruction set, compiles CUDA, and turns a failed build into a message."""

    def build_extension(self, extension):
        compile_one_set = self.compiler.compile

        def compile_each(sources, *, extra_postargs=None, **options):
            objects = []
            for source in sources:
                flags = [*(extra_postargs or []), *INSTRUCTION_SETS.get(source, [])]
                objects += compile_one_set([source], extra_postargs=flags, **options)
            return objects

        self.compiler.compile = compile_each
        try:
            if extension.name.endswith("_cuda"):
                self.build_cuda(extension)
            else:
                super().build_extension(extension)
        finally:
            self.compiler.compile = compile_one_set

    def build_cuda(self, extension):
        try:
            nvcc = find_nvcc()
            archs = cuda_archs(nvcc)
            extension.define_macros += [("R2D2_CUDA_ARCHS", ",".join(map(str, archs)))]
            extension.extra_objects = [compile_cuda(nvcc, archs, Path(self.build_temp))]
            extension.library_dirs += library_folders(nvcc)
            super().build_extension(extension)
        except Exception as error:
            if cuda_wanted() == "1":
                raise
            print(
                f"\nr2d2fast: the CUDA kernels were not built ({error}).\n"
                "r2d2fast: CUDA tensors take the Triton kernels. R2D2FAST_CUDA=1 makes this an error, 0 leaves them out.\n",
                file=sys.stderr,
            )
            self.extensions = [other for other in self.extensions if other is not extension]

    def run(self):
        try:
            super().run()
        except Exception as error:
            if cuda_wanted() == "1":
                raise
            say_pure_python(error)
            self.extensions = []


def cuda_wanted():
    wanted = os.environ.get("R2D2FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"R2D2FAST_CUDA is {wanted!r}; accepted: auto, 0, 1")
    return wanted


def find_nvcc():
    # From its file: the package cannot be imported here, where there may be no PyTorch.
    nvcc = runpy.run_path("r2d2fast/cuda_toolkit.py")["find_cuda_tool"]("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc on PATH nor under CUDA_HOME; install a CUDA toolkit, 12.4 or later")
    return nvcc


def cuda_archs(nvcc):
    """Compute capabilities to build for, ascending, such as [80, 90]."""
    known = sorted(map(int, re.findall(r"^sm_(\d+)$", output(nvcc, "--list-gpu-code"), re.MULTILINE)))
    given = os.environ.get("R2D2FAST_CUDA_ARCHS")
    if given:
        wanted = sorted({int(arch.replace(".", "")) for arch in re.split("[;, ]+", given)})
        wrong = [arch for arch in wanted if arch not in known or arch < OLDEST_ARCH]
        if wrong:
            accepted = ", ".join(str(arch) for arch in known if arch >= OLDEST_ARCH)
            raise ValueError(
                f"R2D2FAST_CUDA_ARCHS is {given!r}: {wrong[0]} is none of those that {nvcc} knows: {accepted}"
            )
        return wanted
    try:
        found = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        present = {int(capability.replace(".", "")) for capability in found.split()}
    except (OSError, subprocess.SubprocessError, ValueError):
        present = set()
    return sorted(present & set(known)) or [arch for arch in (80, 90, 100) if arch in known]


def compile_cuda(nvcc, archs, folder):
    """The object file of csrc/d2_cuda.cu; host and device code warn about nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "d2_cuda.o"
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    later = f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC", "--threads", "0"]
    output(nvcc, *flags, *machine_code, later, "-c", "csrc/d2_cuda.cu", "-o", str(target))
    return str(target)


def library_folders(nvcc):
    """Where the toolkit keeps its libraries: nvcc may be a link or a script anywhere, but it says."""
    return re.findall(r'"-L([^"]+)"', output(nvcc, "--dryrun", "-c", "csrc/d2_cuda.cu"))


def output(*command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise subprocess.SubprocessError(f"{command[0]} failed: {result.stdout.strip()[-2000:]}")
    return result.stdout


def say_pure_python(reason):
    print(
        f"\nr2d2fast: the C++ kernels were not built ({reason}).\n"
        "r2d2fast: installing pure Python: everything works, the D2 step 40 to 90 times slower (measured on a CPU).\n"
        "r2d2fast: install a C++17 compiler, GCC or Clang (Debian: apt-get install g++), and pybind11, and run pip install\n"
        "r2d2fast: again.\n",
        file=sys.stderr,
    )


def extensions():
    if Pybind11Extension is None:
        say_pure_python("no pybind11 in this environment")
        return []
    # OpenMP: the runtime is PyTorch's own, loaded before this library (r2d2fast/_backends/native.py).
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sources = SOURCES + (list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else [])
    cpu = Pybind11Extension(
        "r2d2fast._C",
        sources,
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=FLAGS + openmp,
        extra_link_args=openmp,
    )
    if cuda_wanted() == "0":
        return [cpu]
    # The CUDA runtime is linked statically: it fits whatever PyTorch brings, and is there where PyTorch brings none.
    cuda = Pybind11Extension(
        "r2d2fast._cuda",
        ["csrc/binding_cuda.cpp"],
        depends=[*HEADERS, "csrc/d2_cuda.cu"],
        cxx_std=17,
        extra_compile_args=FLAGS,
        libraries=["cudart_static", "dl", "pthread", "rt"],
    )
    return [cpu, cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
