"""Compiles the Triton kernels with other versions of Triton: ``python -m tests.kernels.tritons [VERSION …]``.

Each version is installed into a folder of its own, which PYTHONPATH puts before the one that PyTorch came with; then
test_compile.py runs over it. By default the oldest that the oldest supported PyTorch brings, and the newest there is.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OLDEST = "3.6.0"  # of torch 2.10, which pyproject.toml asks for


def compile_with(package: str) -> subprocess.CompletedProcess:
    """The tests with a Triton that pip finds under the name of ``package``: their exit status, and all that they print."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["pip", "install", "-q", "--no-deps", "--no-compile", "--upgrade", "--target", folder, package]
        subprocess.run([sys.executable, "-m", *install], check=True)
        (found,) = Path(folder).glob("triton-*.dist-info")
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        tests = ["pytest", "-q", "-m", "slow or not slow", str(Path(__file__).parent / "test_compile.py")]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", *tests], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        done.stdout = f"\n{found.name.removesuffix('.dist-info')}\n{done.stdout}"
        return done


def main(versions: list[str]) -> int:
    packages = [f"triton=={version}" for version in versions] or [f"triton=={OLDEST}", "triton"]
    status = 0
    with ThreadPoolExecutor(2) as pool:  # a version is half a minute of one core
        for done in pool.map(compile_with, packages):
            print(done.stdout, flush=True)
            status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
