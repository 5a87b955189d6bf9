"""``python -m bench.mapped_embeddings``: an epoch of stage 2 on embeddings in a mapped file, beside its matrix products alone."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

from bench.memory import process_memory
from bench.table import machine_list, verdict
from r2d2fast import machine
from r2d2fast.data import embeddings
from r2d2fast.tables import markdown_table
from r2d2fast.train.cli import parse
from r2d2fast.train.load_data import load_data
from r2d2fast.train.methods import R2D2
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.threads import cpu_threads
from r2d2fast.train.trainer import Trainer

STEPS = 50
"""Steps of the trainer, then as many pairs of products, and so on: a busy machine slows both."""
MOST_TIMES_THE_PRODUCTS, MOST_MEMORY = 1.2, 1e9
"""The project's own targets: a ratio of seconds, and bytes of resident memory beside the bank."""


def write_embeddings(folder: Path, samples: int, features: int, classes: int) -> None:
    """float16 rows around a centre for each class; the first ten samples of each class are labelled."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((classes, features), dtype=np.float32)
    numbers = np.arange(samples)
    # Not through a mapping, whose pages would be in the peak of this process's memory.
    with open(folder / "train.npy", "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (samples, features)}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in np.array_split(numbers, max(samples // 10_000, 1)):
            noise = generator.standard_normal((len(piece), features), dtype=np.float32)
            file.write((3 * noise + centres[piece % classes]).astype(np.float16).tobytes())
    np.save(folder / "train_labels.npy", np.where(numbers < 10 * classes, numbers % classes, -1))


def at_stage2(folder: Path, threads: int) -> Trainer:
    """A trainer on the embeddings, by the command line's own way, after the first prediction."""
    embeddings.SHARE_OF_FREE_MEMORY = 0.0  # else a file of this size is read into memory where there are 8 GB of it
    arguments = ["--dataset=embeddings", f"--data-dir={folder}", f"--threads={threads}", "--device=cpu"]
    config, ranks = parse(arguments), Ranks()
    trainer = Trainer(config, *load_data(config, ranks), ranks)
    trainer.go_to(next(number for number, epoch in enumerate(trainer.schedule) if epoch.stage == 2))
    return trainer


class Products:
    """The two matrix products of a step of a linear classifier, always of the same numbers: that of the forward pass, and that
    of the gradient of the weights."""

    def __init__(self, batch: int, features: int, classes: int) -> None:
        self.inputs = torch.randn(batch, features)
        self.weight, self.weight_grad = torch.randn(classes, features), torch.empty(classes, features)
        self.logits, self.logits_grad = torch.empty(batch, classes), torch.randn(batch, classes)

    def run(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self.inputs, self.weight.T, out=self.logits)
            torch.mm(self.logits_grad.T, self.inputs, out=self.weight_grad)


def measure(trainer: Trainer) -> tuple[float, float]:
    """Seconds of an epoch of stage 2, and of its matrix products alone."""
    batches = trainer.batches()
    products = Products(len(batches[0].samples), trainer.data.train.shape[0], trainer.data.num_classes)
    trainer.train(batches[:2])
    products.run(2)
    ours = alone = 0.0
    for start in range(2, len(batches), STEPS):
        began = time.perf_counter()
        trainer.train(batches[start : start + STEPS])
        between = time.perf_counter()
        products.run(len(batches[start : start + STEPS]))
        ours, alone = ours + between - began, alone + time.perf_counter() - between
    return ours, alone


def main(
    *,
    samples: int = 1_280_000,
    features: int = 768,
    classes: int = 1000,
    threads: int = torch.get_num_threads(),
    folder: Path | None = None,
) -> None:
    """An epoch of stage 2 on embeddings in a mapped file, beside its matrix products alone.

    Args:
        samples: Number of samples; their numbers are random.
        features: Numbers of each.
        classes: Number of classes; ten samples of each are labelled.
        threads: CPU threads of both.
        folder: Where the file goes; the default is the system's folder for temporary files.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    about = machine.describe()
    try:
        write_embeddings(folder, samples, features, classes)
        trainer = at_stage2(folder, threads)
        assert isinstance(trainer.method, R2D2)
        with cpu_threads(threads):
            began = time.perf_counter()
            trainer.method.predict()
            prediction = time.perf_counter() - began
            ours, alone = measure(trainer)
        memory = process_memory("VmHWM") - trainer.method.bank.nbytes
        own = process_memory("RssAnon") - trainer.method.bank.nbytes
    finally:
        shutil.rmtree(folder)
    print(machine_list(about), end="\n\n")
    print(f"{samples} x {features} float16, {classes} classes, {threads} threads, prediction {prediction:.0f} s.\n")
    ratio = ours / alone
    rows = [
        (
            "an epoch of stage 2, seconds",
            f"{ours:.1f}, products alone {alone:.1f}: {ratio:.2f} times",
            f"≤ {MOST_TIMES_THE_PRODUCTS} times",
            verdict(ratio <= MOST_TIMES_THE_PRODUCTS),
        ),
        (
            "peak resident memory beside the bank, MB",
            f"{memory / 1e6:.0f}, at the end {own / 1e6:.0f} without pages of files",
            f"≤ {MOST_MEMORY / 1e6:.0f}",
            verdict(memory <= MOST_MEMORY),
        ),
    ]
    print(markdown_table(("", "measured", "target", ""), rows))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.mapped_embeddings", config=(tyro.conf.FlagCreatePairsOff,))
