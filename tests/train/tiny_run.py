"""A run of a second, for tests that need whole runs; here, where a process of its own can import it."""

import torch

from r2d2fast.train import cli, run

# Eleven epochs, 32 steps, with every kind of event in them.
TINY = [
    *("--stage1.epochs=4", "--stage1.batch=50", "--stage1.cosine-epochs=5"),
    *("--stage2.epochs=5", "--stage2.repredict-epochs=2,4", "--stage2.lrs=0.1,0.05,0.01"),
    *("--stage2.unlabelled-batch=300", "--stage3.epochs=2", "--stage3.batch=512"),
]


def train_with_a_checkpoint_each_epoch(arguments):
    torch.set_num_threads(1)
    run.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    raise SystemExit(cli.main([*TINY, *arguments]))
