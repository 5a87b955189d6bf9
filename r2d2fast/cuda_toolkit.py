"""Where the programs of a CUDA toolkit are. setup.py runs this file before there is a package, so that it imports no other."""

import importlib.util
import os
import shutil
from pathlib import Path


def find_cuda_tool(name: str) -> str | None:
    """The path of nvcc, cuobjdump or nvdisasm; None if there is none.

    The folders of PATH come first, then those of CUDA_HOME and CUDA_PATH or, where neither is set, /usr/local/cuda; last
    Triton's wheel, which brings cuobjdump and nvdisasm along.
    """
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home] or ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(folders))
