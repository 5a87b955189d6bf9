"""Runs of a second, for tests that need whole runs; here, where a process of its own can import them."""

import os
import signal
import sys
from pathlib import Path

import torch

from r2d2fast.train import checkpoint, cli
from r2d2fast.train.checkpoint import find_checkpoint, keep_good, save_checkpoint
from r2d2fast.train.ranks import Ranks

# Eleven epochs, 30 steps, with every kind of event in them.
TINY = [
    *("--stage1.epochs=4", "--stage1.batch=50", "--stage1.cosine-epochs=5"),
    *("--stage2.epochs=5", "--stage2.repredict-epochs=2,4", "--stage2.lrs=0.1,0.05,0.01"),
    *("--stage2.unlabelled-batch=300", "--stage3.epochs=2", "--stage3.batch=512"),
]


def train_with_a_checkpoint_each_epoch(arguments):
    torch.set_num_threads(1)
    checkpoint.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    checkpoint.CHECKPOINT_SHARE = 0
    raise SystemExit(cli.main([*TINY, *arguments]))


# --- a process that kills itself


def kill_at_write(count):
    """Let the process kill itself just before its ``count``-th opening to write, making, renaming or removing of a file."""
    left = [count]

    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and not _device(arguments[0])
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _device(path):
    return str(path).startswith("/dev/")


def train_killed_at_write(arguments):
    *arguments, count = arguments
    kill_at_write(int(count))
    train_with_a_checkpoint_each_epoch(arguments)


# --- states to write as checkpoints


def tensors(number):
    return {
        "network": {"weight": torch.full((100,), float(number)), "count": torch.tensor(number)},
        "optimizer": {},
        "bank": torch.full((50, 3), -float(number)),
    }


def values(number):
    return {"history": [{"error": 0.1 * number}], "position": [0, number]}


def save(directory, number):
    save_checkpoint(directory, tensors(number), values(number), Ranks())


def save_killed_at_write(arguments):
    directory, number, count = arguments
    torch.set_num_threads(1)
    kill_at_write(int(count))
    save(Path(directory), int(number))


def keep_good_killed_at_write(arguments):
    directory, count = arguments
    kill_at_write(int(count))
    path, _ = find_checkpoint(Path(directory))
    keep_good(path)
