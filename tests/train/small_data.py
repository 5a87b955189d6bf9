"""A data set of four classes, and a run of 26 steps on it, with every kind of event."""

import json
from dataclasses import replace

import torch
from torch import nn

from r2d2fast.data import Dataset, Embeddings, ResidentImages, consecutive_batches, split_labels
from r2d2fast.models import small_convnet
from r2d2fast.models.backbones import Backbone
from r2d2fast.train import state
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
# The first epoch of stage 1 has too few images for a look at the test error.
EPOCHS, STEPS, EVALUATIONS = 8, 26, 7
# What depends on the clock and not on the run.
TIMES = ("seconds", "images_per_second", "outside_network")
WITH_DROPOUT = Backbone(lambda classes, channels, size: small_convnet(channels, classes).insert(7, nn.Dropout()))
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


def embeddings():
    """The pixels as embeddings, and what a run of :data:`CONFIG` changes for a linear head that leaves features out."""
    images = dataset()
    train, test = (Embeddings(all_images(part).flatten(1), CPU) for part in (images.train, images.test))
    return replace(images, train=train, test=test), {"backbone": "linear", "translate": 0, "dropout": 0.5}


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


def saved(trainer):
    """What a checkpoint holds: values by way of JSON, tensors copied."""
    tensors = {
        name: {key: value.clone() for key, value in part.items()} if isinstance(part, dict) else part.clone()
        for name, part in state.tensors(trainer).items()
    }
    return json.dumps(state.values(trainer)), tensors


def loaded(config, before):
    """A trainer with the state that was saved ``before``."""
    values, tensors = before
    trainer = make_trainer(config)
    state.load_values(trainer, json.loads(values))
    targets = state.tensors(trainer)
    assert targets.keys() == tensors.keys()
    for name, target in targets.items():
        pairs = {name: (target, tensors[name])}
        if isinstance(target, dict):
            assert target.keys() == tensors[name].keys()
            pairs = {key: (target[key], tensors[name][key]) for key in target}
        for to, value in pairs.values():
            to.copy_(value)
    return trainer


def assert_same_run(one, other):
    """Network, momentum, what the method keeps, and metrics, to the last bit."""
    for (name, ours), theirs in zip(state.tensors(one).items(), state.tensors(other).values(), strict=True):
        ours, theirs = (part if isinstance(part, dict) else {name: part} for part in (ours, theirs))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name
    assert state.values(one)["method"] == state.values(other)["method"]
    assert history_without_times(one) == history_without_times(other)
