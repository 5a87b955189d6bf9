"""What the processes of test_ranks.py do; here, where processes of their own can import it."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data import Batch, BatchSampler
from r2d2fast.train.cli import parse
from r2d2fast.train.load_data import load_data
from r2d2fast.train.ranks import Ranks, join_ranks
from r2d2fast.train.trainer import Trainer

# An epoch of each stage with an uneven last batch: 55 = 2 · 20 + 15 labelled samples, 1437 = 2 · 600 + 237 in all.
FLAGS = [
    *("--num-labels=50", "--stage1.epochs=1", "--stage1.batch=35", "--stage1.cosine-epochs=1"),
    *("--stage2.epochs=2", "--stage2.repredict-epochs=1", "--stage2.lrs=0.1,0.05"),
    *("--stage2.unlabelled-batch=300", "--stage2.labelled-batch=100", "--stage3.epochs=1", "--stage3.batch=600"),
]


class BothRanksInOne(Trainer):
    """One process that sees the global batches of two ranks, each rank's part normalised apart."""

    def batches(self) -> list[Batch]:
        sampler, parts = self.sampler, []
        for rank in (0, 1):
            self.sampler = BatchSampler(self.labelled, self.unlabelled, self.config.seed, rank, 2)
            parts.append(super().batches())
        self.sampler = sampler
        both = []
        for (index, keys, size), (other_index, other_keys, same_size) in zip(*parts, strict=True):
            assert size == same_size == len(index) + len(other_index)
            both.append(Batch(torch.cat([index, other_index]), torch.cat([keys, other_keys]), size))
        return both


def trained(kind: type[Trainer], ranks: Ranks, flags: list[str]) -> dict[str, Tensor]:
    """Network, metrics and pseudo-logits (by sample, zero where a rank has none) after all epochs."""
    config = parse([*FLAGS, *flags])
    trainer = kind(config, *load_data(config, ranks), ranks)
    trainer.fit()
    pseudo_logits = torch.zeros(len(trainer.labels), 10)
    pseudo_logits[trainer.ownership.samples] = trainer.method.bank.pseudo_logits
    names = ("train_loss", "test_error", "pseudo_label_error", "class_loss")
    metrics = [row[name] for row in trainer.history for name in names if row.get(name) is not None]
    return {**trainer.model.state_dict(), "pseudo_logits": pseudo_logits, "metrics": torch.tensor(metrics)}


def by_method(method: str, ranks: Ranks) -> dict[str, Tensor]:
    """Network and losses after two epochs, three of stage 1 alone."""
    flags = ["--stage1.epochs=3", "--stage2.epochs=2", "--stage2.unlabelled-batch=300", "--stage2.labelled-batch=100"]
    config = parse(["--method", method, *flags])
    trainer = Trainer(config, *load_data(config, ranks), ranks)
    trainer.fit()
    return {**trainer.model.state_dict(), "losses": torch.tensor([row["train_loss"] for row in trainer.history])}


def main(directory: str, *methods: str) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        state = {method: by_method(method, ranks) for method in methods} or trained(Trainer, ranks, [])
        torch.save(state, Path(directory) / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
