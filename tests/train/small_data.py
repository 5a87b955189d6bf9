"""A data set of four classes, and a run of 26 steps on it, with every kind of event."""

from dataclasses import replace

import torch

from r2d2fast.data import Dataset, ResidentImages, consecutive_batches, split_labels
from r2d2fast.train.callback import Callback
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.trainer import Trainer

CPU = torch.device("cpu")
DIGITS = RECIPES["digits"].config
# 8 labelled samples and 112 unlabelled ones, 24 of which fill no batch: epochs 0 and 1 are stage 1, of two steps each; 2 to 5
# stage 2, of four, with a reprediction before 4; 6 and 7 stage 3, of three.
CONFIG = replace(
    DIGITS,
    split=0,
    device="cpu",
    num_labels=8,
    stage1=replace(DIGITS.stage1, epochs=2, batch=4, lr=0.05, cosine_epochs=2),
    stage2=replace(
        DIGITS.stage2, epochs=4, unlabelled_batch=24, labelled_batch=5, repredict_epochs=(2,), lrs=(0.1, 0.02)
    ),
    stage3=replace(DIGITS.stage3, epochs=2, batch=40, lr=0.01),
)
EPOCHS, STEPS = 8, 26
# What depends on the clock and not on the run.
TIMES = ("seconds", "images_per_second", "outside_network")
MEAN, STD = torch.tensor([100.0]), torch.tensor([50.0])


def pixels(labels):
    """An image of each class, which has a bright corner of its own, and noise: uint8 [M, 1, 8, 8]."""
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label % 4 // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 1.0
    return (MEAN.item() + STD.item() * images).round().clamp(0, 255).to(torch.uint8)


def dataset(classes=4, changed=lambda train: train, device=CPU):
    """120 training and 40 test images; ``changed`` may change the pixels of the former."""
    labels = torch.arange(160) % classes
    values = pixels(labels)
    return Dataset(
        train=ResidentImages(changed(values[:120].clone()), MEAN, STD, device),
        test=ResidentImages(values[120:], MEAN, STD, device),
        train_labels=labels[:120],
        test_labels=labels[120:],
        class_names=[f"class {number}" for number in range(classes)],
        train_names=list(map(str, range(120))),
    )


def labels_of_split():
    return split_labels(torch.arange(120) % 4, 4, CONFIG.num_labels, 0)


def make_trainer(config=CONFIG, data=None, device=CPU, ranks=None):
    return Trainer(config, data or dataset(device=device), labels_of_split(), ranks or Ranks(device=device))


class Calling(Callback):
    """Calls a function between steps."""

    def __init__(self, function):
        self.function = function

    def between_steps(self, trainer):
        self.function()


def trainer_after(epochs, config=CONFIG):
    trainer = make_trainer(config)
    for _ in range(epochs):
        trainer.run_epoch()
    return trainer


def all_images(images):
    """As evaluation sees them: float32 [M, C, H, W]."""
    (everything,) = images.batches(consecutive_batches(torch.arange(len(images)), len(images)), None, 0)
    return everything


def pseudo_logits(trainer):
    """Of the unlabelled samples, in the order of their numbers."""
    return trainer.method.bank.logits(trainer.ownership.local[trainer.unlabelled])


def history_without_times(trainer):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in trainer.history]


def assert_same_run(one, other):
    """Network, pseudo-logits and metrics, to the last bit."""
    networks = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert torch.equal(pseudo_logits(one), pseudo_logits(other))
    assert int(one.method.bank.updates) == int(other.method.bank.updates)
    assert history_without_times(one) == history_without_times(other)
