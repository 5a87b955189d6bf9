"""What the processes of test_ranks.py do; here, where processes of their own can import it."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data import Batch, BatchSampler
from r2d2fast.train.cli import parse
from r2d2fast.train.ranks import Ranks, join_ranks
from r2d2fast.train.schedule import Epoch
from r2d2fast.train.sources import load_data
from r2d2fast.train.trainer import Trainer

# An epoch of each stage with an uneven last batch: 55 = 2 · 20 + 15 labelled samples, 1437 = 2 · 600 + 237 in all.
FLAGS = [
    *("--num-labels=50", "--stage1.epochs=1", "--stage1.batch=35", "--stage1.cosine-epochs=1"),
    *("--stage2.epochs=2", "--stage2.repredict-epochs=1", "--stage2.lrs=0.1,0.05"),
    *("--stage2.unlabelled-batch=300", "--stage2.labelled-batch=100", "--stage3.epochs=1", "--stage3.batch=600"),
]


class BothRanksInOne(Trainer):
    """One process that sees the global batches of two ranks, each rank's part normalised apart."""

    def order(self, epoch: Epoch):
        parts = []
        for rank in (0, 1):
            self.batches = BatchSampler(self.labelled, self.unlabelled, self.config.seed, rank, 2)
            parts.append(list(super().order(epoch)))
        self.batches = BatchSampler(self.labelled, self.unlabelled, self.config.seed)
        for one, other in zip(*parts, strict=True):
            index = torch.cat([one.samples, other.samples])
            assert one.global_size == other.global_size == len(index)
            yield Batch(index, torch.cat([one.keys, other.keys]), one.global_size)


def trained(kind: type[Trainer], ranks: Ranks, flags: list[str]) -> dict[str, Tensor]:
    """Network, metrics and pseudo-logits (by sample, zero where a rank has none) after all epochs."""
    config = parse([*FLAGS, *flags])
    trainer = kind(config, *load_data(config, ranks), ranks)
    for _ in trainer.schedule:
        trainer.run_epoch()
    rows = len(trainer.bank.pseudo_logits)
    pseudo_logits = torch.zeros(len(trainer.labels), 10)
    pseudo_logits[trainer._samples[:rows]] = trainer.bank.pseudo_logits
    names = ("train_loss", "test_error", "pseudo_label_error", "class_loss")
    metrics = [row[name] for row in trainer.rows for name in names if row.get(name) is not None]
    return {**trainer.model.state_dict(), "pseudo_logits": pseudo_logits, "metrics": torch.tensor(metrics)}


def main(directory: str) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        state = trained(Trainer, ranks, [])
        torch.save(state, Path(directory) / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
