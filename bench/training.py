"""``python -m bench.training``: how much of a D2 step is not the network's own time, and what a run gains on a plain loop."""

import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.baselines import d2_loss
from bench.photographs import write_photographs
from bench.plain_loop import PlainLoop
from bench.table import machine_list
from r2d2fast import machine
from r2d2fast.data import Dataset, Embeddings, PhotographOptions, ResidentImages, load_dataset, load_folder
from r2d2fast.devices import find_device
from r2d2fast.tables import markdown_table
from r2d2fast.train.config import Config
from r2d2fast.train.methods import R2D2
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.schedule import batch_size
from r2d2fast.train.stopwatch import EVERY, Stopwatch
from r2d2fast.train.threads import cpu_threads
from r2d2fast.train.trainer import Trainer

CPU = torch.device("cpu")
MOST_OUTSIDE = {"digits": 0.10, "resnet18": 0.05}
"""The project's own targets: shares of the time."""
FASTER_THAN_PLAIN = 1.5
HEAD_STEPS = 2 * EVERY + 1
"""Of the linear head; on a GPU one step of :data:`EVERY` is timed."""
PUBLISHED = (
    ("ffcv, labels alone, 160 to 192 pixels, an A100", "9800"),
    ("timm, labels alone, 224 pixels, an RTX 3090", "3482"),
)
"""Images of ImageNet that ResNet-18 is trained on in a second, as their authors give them."""


def digits() -> Trainer:
    """A trainer with the recipe of the digits."""
    dataset = load_dataset("digits", Path(), CPU, False)
    return _trainer(RECIPES["digits"].config, dataset)


def photographs(folder: Path, device: torch.device = CPU) -> Trainer:
    """ResNet-18 at 224 pixels on JPEG files, said to be of 1000 classes; 12 unlabelled and 4 labelled in a batch, on a GPU 384
    and 128, which loader processes read."""
    write_photographs(folder, 160 if device == CPU else 2000, 2)
    config = RECIPES["imagenet"].config
    found = load_folder(folder, device, PhotographOptions(workers=0 if device == CPU else config.workers))
    labels = torch.randint(1000, (len(found.train_labels),), generator=torch.Generator().manual_seed(0))
    dataset = replace(found, train_labels=labels, class_names=[str(number) for number in range(1000)])
    if device == CPU:
        config = replace(config, stage2=replace(config.stage2, unlabelled_batch=12, labelled_batch=4))
    return _trainer(config, dataset, device)


def thumbnails(size: int, channels: int, translate: int) -> tuple[Trainer, PlainLoop]:
    """The small network on images of Fashion-MNIST's or CIFAR's size, and the plain loop with the same."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20_000, channels, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (len(pixels),), generator=generator)
    mean, std = torch.full((channels,), 127.5), torch.full((channels,), 73.9)
    images = ResidentImages(pixels, mean, std, CPU)
    names = [str(number) for number in range(len(pixels))]
    dataset = Dataset(images, ResidentImages(pixels[:512], mean, std, CPU), labels, labels[:512], names[:10], names)
    config = replace(RECIPES["fashion-mnist"].config, translate=translate)
    trainer = _trainer(config, dataset)
    loop = PlainLoop(config, pixels, _split(labels, 1000), trainer.model)
    return trainer, loop


def linear_head(device: torch.device = CPU) -> Trainer:
    """A linear classifier of generated embeddings, 1280 numbers each, of 10 classes: as good as nothing is the network's."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40_000) % 10  # for more steps than are timed: in the last one of an epoch the method measures
    rows = torch.randn(10, 1280, generator=generator)[labels] + 3 * torch.randn(len(labels), 1280, generator=generator)
    train, test = Embeddings(rows, device), Embeddings(rows[:0], device)
    names = [str(number) for number in range(len(rows))]
    return _trainer(RECIPES["embeddings"].config, Dataset(train, test, labels, labels[:0], names[:10], names), device)


def _split(labels: torch.Tensor, labelled: int) -> torch.Tensor:
    return torch.where(torch.arange(len(labels)) < labelled, labels, -1)


def _trainer(config: Config, dataset: Dataset, device: torch.device = CPU) -> Trainer:
    """A trainer at the beginning of stage 2, with the first tenth of the samples labelled."""
    labels = _split(dataset.train_labels, len(dataset.train) // 10)
    trainer = Trainer(replace(config, split=0, log_interval=50), dataset, labels, Ranks(device=device))
    trainer.go_to(next(number for number, epoch in enumerate(trainer.schedule) if epoch.stage == 2))
    return trainer


def steps_of(trainer: Trainer, count: int) -> Callable[[], None]:
    """A function that takes ``count`` steps of stage 2 and reads the metrics at their end."""
    epoch, method = trainer.position.epoch, trainer.method
    assert isinstance(method, R2D2)

    def run() -> None:
        trainer.go_to(epoch)
        trainer.train(trainer.batches()[:count])
        method.d2_loss.read_statistics()

    return run


def share_outside(trainer: Trainer, count: int, rounds: int) -> float:
    """Median over rounds of the part of the time that is not the network's."""
    run = steps_of(trainer, count)
    run()
    shares = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        share = trainer.stopwatch.share_outside(time.perf_counter() - began)
        assert share is not None
        shares.append(share)
    return statistics.median(shares)


def share_of_loss(trainer: Trainer, count: int, rounds: int, eager: bool) -> float:
    """Median over rounds of the part of the time that the D2 step takes: ours, or in its place eager PyTorch's, which gives
    labelled samples the pseudo-labels of others."""
    method = trainer.method
    assert isinstance(method, R2D2)
    bank, unlabelled, own = method.bank, trainer.config.stage2.unlabelled_batch, method._d2

    def by_autograd(logits: torch.Tensor, index: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = bank.slots.index_select(0, trainer.ownership.local.index_select(0, index)).long()
        leaf, rows = logits.detach().requires_grad_(), bank.pseudo_logits.index_select(0, slots.clamp_min(0))
        loss = d2_loss(leaf, rows.requires_grad_())
        loss.backward()
        assert leaf.grad is not None
        assert rows.grad is not None
        moved = rows.detach().sub_(rows.grad, alpha=trainer.config.label_lr)
        bank.pseudo_logits.index_copy_(0, slots[:unlabelled], moved[:unlabelled])
        return loss.detach(), leaf.grad

    def timed(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        watch.next_step()
        with watch:
            return (by_autograd if eager else own)(*given)

    run, shares = steps_of(trainer, count), []
    with unittest.mock.patch.object(method, "_d2", timed):
        for _ in range(rounds + 1):
            watch, began = Stopwatch(trainer.ranks.device), time.perf_counter()
            run()
            outside = watch.share_outside(time.perf_counter() - began)
            assert outside is not None
            shares.append(1 - outside)
    return statistics.median(shares[1:])


def share_of_plain(loop: PlainLoop, count: int, rounds: int) -> float:
    """The same share for the plain loop."""
    loop.run(2)
    shares = []
    for _ in range(rounds):
        began = time.perf_counter()
        inside = loop.run(count)
        shares.append(1 - inside / (time.perf_counter() - began))
    return statistics.median(shares)


def images_per_second(trainer: Trainer, count: int, rounds: int) -> float:
    """Median over rounds of the images that ``count`` steps of stage 2 train on in a second, from the files on."""
    run = steps_of(trainer, count)
    run()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()  # waits for the device in the end
        seconds.append(time.perf_counter() - began)
    return count * batch_size(trainer.config, 2) / statistics.median(seconds)


def times_as_fast(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> float:
    """How many times as long theirs takes: the median over rounds, in which both take turns."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for run in (ours, theirs):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])


def main(*, rounds: int = 9) -> None:
    """How much of a D2 step is not the network's own time, and what a run gains on a plain loop.

    Args:
        rounds: Timed passes of each, taken in turn.
    """
    about = machine.describe()
    device = find_device("auto")
    rows = []
    with cpu_threads(1), tempfile.TemporaryDirectory() as folder:
        outside = {
            "digits": share_outside(digits(), 14, rounds),
            "resnet18": share_outside(photographs(Path(folder)), 2, max(rounds // 3, 2)),
        }
        head = linear_head(device)
        loss_rows = [
            (name, f"{100 * share_of_loss(head, HEAD_STEPS, rounds, eager):.1f} %")
            for name, eager in (("ours", False), ("eager PyTorch", True))
        ]
        for name, size, channels, translate in (("Fashion-MNIST", 28, 1, 2), ("CIFAR", 32, 3, 4)):
            trainer, loop = thumbnails(size, channels, translate)
            faster = times_as_fast(steps_of(trainer, 5), lambda loop=loop: loop.run(5), rounds)  # type: ignore[misc]
            shares = share_outside(trainer, 5, rounds), share_of_plain(loop, 5, rounds)
            rows.append((name, f"{faster:.2f}", f"{100 * shares[0]:.0f} %", f"{100 * shares[1]:.0f} %"))
    with tempfile.TemporaryDirectory() as folder:
        images = images_per_second(photographs(Path(folder), device), 2 if device == CPU else 3, max(rounds // 3, 2))

    print(machine_list(about), end="\n\n")
    print("Share of a D2 step outside the network's passes and its optimizer; one thread.", end="\n\n")
    table = [(name, f"{100 * share:.1f} %", f"≤ {100 * MOST_OUTSIDE[name]:.0f} %") for name, share in outside.items()]
    print(markdown_table(("network", "outside", "target"), table), end="\n\n")
    print("Share of a D2 step that the loss, its gradient and the bank's update take, of a linear head.", end="\n\n")
    print(markdown_table(("", f"share, {device.type}"), loss_rows), end="\n\n")
    print(f"Against a plain loop, small network, batches of 384 + 128; target ≥ {FASTER_THAN_PLAIN}.", end="\n\n")
    print(
        markdown_table(("images like", "times the images/s", "outside the network", "plain loop's"), rows), end="\n\n"
    )
    print("ResNet-18 from JPEG files, images a second; the others as published, each on its own hardware.", end="\n\n")
    ours = f"ours, stage 2 at 224 pixels, {device.type}"
    print(markdown_table(("", "images a second"), [(ours, f"{images:.0f}"), *PUBLISHED]))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.training", config=(tyro.conf.FlagCreatePairsOff,))
