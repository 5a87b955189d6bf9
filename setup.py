"""Builds r2d2fast._C, the C++ kernels; everything else is in pyproject.toml.

The extension includes no PyTorch header, so that it builds in seconds, under build isolation, for any torch version.
Without a working compiler the package installs as pure Python and says so.
"""

import platform
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # --no-build-isolation on a machine without it
    sys.exit("r2d2fast: building needs pybind11; run `pip install pybind11`, or install without --no-build-isolation")

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
    f"csrc/{name}.h" for name in ("d2_cpu", "d2_cpu_kernels", "d2_cpu_rows", "d2_math", "dispatch", "philox", "simd")
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
            print(
                f"\nr2d2fast: the C++ kernels were not built ({error}).\n"
                "r2d2fast: installing pure Python: everything works, the D2 step several times slower.\n"
                "r2d2fast: install a C++17 compiler (Debian: apt-get install g++) and run pip install again for the fast one.\n",
                file=sys.stderr,
            )
            self.extensions = []


def extension() -> Pybind11Extension:
    # OpenMP: the runtime is PyTorch's own, loaded before this library (r2d2fast/_backends/native.py).
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sources = SOURCES + (list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else [])
    return Pybind11Extension(
        "r2d2fast._C",
        sources,
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=FLAGS + openmp,
        extra_link_args=openmp,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
