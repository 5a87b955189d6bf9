"""Compiles the Triton kernels with other versions of Triton: ``python -m tests.kernels.tritons [VERSION …]``.

Each version is installed into a folder of its own, which PYTHONPATH puts before the one that PyTorch came with; then
test_compile.py runs over it. By default the oldest that the oldest supported PyTorch brings, and the newest there is.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

OLDEST = "3.6.0"  # of torch 2.10, which pyproject.toml asks for


def main(versions: list[str]) -> int:
    for package in [f"triton=={version}" for version in versions] or [f"triton=={OLDEST}", "triton"]:
        with tempfile.TemporaryDirectory() as folder:
            install = ["pip", "install", "-q", "--no-deps", "--upgrade", "--target", folder, package]
            subprocess.run([sys.executable, "-m", *install], check=True)
            (found,) = Path(folder).glob("triton-*.dist-info")
            print(f"\n{found.name.removesuffix('.dist-info')}", flush=True)
            path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
            tests = ["pytest", "-q", "-m", "slow or not slow", str(Path(__file__).parent / "test_compile.py")]
            result = subprocess.run([sys.executable, "-m", *tests], env={**os.environ, "PYTHONPATH": path}, check=False)
            if result.returncode:
                return result.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
