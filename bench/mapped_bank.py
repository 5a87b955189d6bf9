"""``python -m bench.mapped_bank``: stage 2 with a bank of 5 GB in a mapped file, in a process that may have 2 GB of memory.

The limit is that of a memory cgroup, which counts pages of files, too (those of PyTorch's libraries only if no other process
has them in memory). Where none can be made (not root, or version 2 without delegation), it is one on the process's own data
(RLIMIT_DATA), which does not count them.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from bench.memory import process_memory
from r2d2fast.data import Dataset, ResidentImages
from r2d2fast.train import state
from r2d2fast.train.checkpoint import save_checkpoint
from r2d2fast.train.methods import R2D2
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.trainer import Trainer

SAMPLES, CLASSES = 1_250_000, 1000
LIMIT = 2 * 10**9
STEPS = 100
GROUP = Path("/sys/fs/cgroup/memory/r2d2fast-bench")


def limited() -> str:
    """Limit this process's memory. Returns a description of the limit."""
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT))
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        return f"a memory cgroup of {LIMIT / 1e9:.0f} GB, mapped pages included"
    except OSError:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        return f"RLIMIT_DATA of {LIMIT / 1e9:.0f} GB, mapped pages not counted"


def trainer(folder: Path) -> Trainer:
    """A trainer at the beginning of stage 2, with as many samples and classes as ImageNet, of 8 x 8 pixels."""
    pixels = torch.randint(256, (SAMPLES, 1, 8, 8), dtype=torch.uint8)
    images = ResidentImages(pixels, torch.tensor([127.5]), torch.tensor([73.9]), torch.device("cpu"))
    labels = torch.full((SAMPLES,), -1)
    labels[:CLASSES] = torch.arange(CLASSES)
    names = [str(number) for number in range(CLASSES)]
    dataset = Dataset(images, images, labels.clamp(min=0), labels.clamp(min=0), names, names)
    config = replace(RECIPES["digits"].config, split=0, bank_storage=str(folder / "bank.bin"))
    result = Trainer(config, dataset, labels, Ranks())
    result.go_to(config.stage1.epochs)
    return result


def measure(folder: Path) -> None:
    """Call it in a process of its own, because it limits the memory of the process."""
    limit = limited()
    one = trainer(folder)
    method = one.method
    assert isinstance(method, R2D2)
    print(f"bank: {method.bank.nbytes / 1e9:.2f} GB; limit: {limit}", flush=True)
    for name, action in {
        "prediction of all rows": method.predict,
        f"{STEPS} steps": lambda: one.train(one.batches()[:STEPS]),
        "hard labels": method.hard_labels,
        "checkpoint": lambda: save_checkpoint(folder, state.tensors(one), state.values(one), one.ranks),
    }.items():
        began = time.perf_counter()
        action()
        peak, own = (process_memory(field) / 1e9 for field in ("VmHWM", "RssAnon"))
        print(
            f"{name}: {time.perf_counter() - began:.1f} s; peak resident {peak:.2f} GB, own (anonymous) {own:.2f} GB",
            flush=True,
        )


def main(*, folder: Path | None = None) -> None:
    """Stage 2 with a bank of 5 GB in a mapped file, in a process that may have 2 GB of memory.

    Args:
        folder: Where the 10 GB of files go; the default is the system's folder for temporary files.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    program = f"from pathlib import Path; from bench.mapped_bank import measure; measure(Path({str(folder)!r}))"
    try:
        subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
    finally:
        shutil.rmtree(folder)
        if GROUP.exists():
            GROUP.rmdir()


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.mapped_bank", config=(tyro.conf.FlagCreatePairsOff,))
