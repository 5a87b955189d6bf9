"""Builds r2d2fast._C, the C++ kernels; everything else is in pyproject.toml.

The extension includes no PyTorch header, so that it builds in seconds, under build isolation, for any torch version.
Without a working compiler, or pybind11, the package installs as pure Python: it says so here, which pip shows with -v,
in r2d2fast.backends(), and at the first step.
"""

import platform
import sys

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
HEADERS = [
    f"csrc/{name}.h" for name in ("d2_cpu", "d2_cpu_kernels", "d2_cpu_rows", "d2_math", "d2_step", "dispatch", "philox", "simd")
]


class BuildExtension(build_ext):
    """Gives each file the flags of its instruction set, and turns a failed build into a message."""

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
            super().build_extension(extension)
        finally:
            self.compiler.compile = compile_one_set

    def run(self):
        try:
            super().run()
        except Exception as error:
            say_pure_python(error)
            self.extensions = []


def say_pure_python(reason):
    print(
        f"\nr2d2fast: the C++ kernels were not built ({reason}).\n"
        "r2d2fast: installing pure Python: everything works, the D2 step 40 to 90 times slower (measured on a CPU).\n"
        "r2d2fast: install a C++17 compiler (Debian: apt-get install g++) and pybind11, and run pip install again.\n",
        file=sys.stderr,
    )


def extensions():
    if Pybind11Extension is None:
        say_pure_python("no pybind11 in this environment")
        return []
    # OpenMP: the runtime is PyTorch's own, loaded before this library (r2d2fast/_backends/native.py).
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sources = SOURCES + (list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else [])
    return [
        Pybind11Extension(
            "r2d2fast._C",
            sources,
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=FLAGS + openmp,
            extra_link_args=openmp,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
