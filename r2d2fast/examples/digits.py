"""What the examples share and no framework changes: data, network, labels alone, learning rates, the test error."""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from r2d2fast import ShardedBatchSampler, ShardedPseudoLabelBank, with_index
from r2d2fast.data import Batch, Images, load_dataset, split_labels
from r2d2fast.models.small import small_convnet

CLASSES = 10
LABELS = 50
UNLABELLED_BATCH, LABELLED_BATCH = 96, 32
"""Of all processes and accumulated batches together."""
LABEL_LR = 1000.0
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
"""As torchrun says."""


def options(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0, help="of the labels drawn, the network and all orders")
    parser.add_argument("--epochs", type=int, default=120, help="passes over the unlabelled samples")
    parser.add_argument("--stage1-epochs", type=int, default=200, help="passes over the labelled samples before")
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoints; a run in it goes on")
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make a step of the optimizer")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    return parser.parse_args(arguments)


class Digits:
    """The data: 1437 images to train on, 50 of them labelled, 360 to test on; float32 ``[1, 8, 8]``."""

    def __init__(self, seed: int) -> None:
        data = load_dataset("digits", Path(), torch.device("cpu"), download=False)
        self.images, test_images = map(_normalised, (data.train, data.test))
        self.labels = split_labels(data.train_labels, CLASSES, LABELS, seed)
        self.train = with_index(TensorDataset(self.images))  # (image, index) for each sample
        self.test = TensorDataset(test_images, data.test_labels)

    def sampler(self, accumulate: int, seed: int) -> ShardedBatchSampler:
        """Of this process's batches."""
        parts = PROCESSES * accumulate
        return ShardedBatchSampler(self.labels, UNLABELLED_BATCH // parts, LABELLED_BATCH // parts, seed)

    def test_error(self, network: nn.Module) -> float:
        """In percent."""
        images, classes = self.test.tensors
        network.eval()
        with torch.no_grad():
            return 100 * (network(images).argmax(1) != classes).double().mean().item()


def _normalised(images: Images) -> Tensor:
    numbers = torch.arange(len(images))
    return next(images.batches([Batch(numbers, None, len(images))], None, 0))


def shifted(images: Tensor, seed: int) -> Tensor:
    """Each image moved by up to a pixel down and right: the augmentation. The seed makes a run that goes on repeat itself."""
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)  # [B, 1, 9, 8, 8]
    return windows[torch.arange(len(images)), :, torch.randint(9, (len(images),), generator=generator)]


def sgd(network: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-3)


def pretrained(digits: Digits, seed: int, epochs: int) -> nn.Module:
    """A network that has learned the labelled samples: stage 1, ordinary supervised training, in whatever way one does that."""
    torch.manual_seed(seed)
    network = small_convnet(1, CLASSES)
    optimizer = sgd(network, 0.05)
    labelled = (digits.labels >= 0).nonzero()[:, 0]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for batch in labelled[torch.randperm(LABELS)].split(25):
            images = shifted(digits.images[batch], int(torch.randint(2**31, ())))
            F.cross_entropy(network(images), digits.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network


def predicts(epoch: int, epochs: int) -> bool:
    """Whether pseudo-labels are predicted (anew) before an epoch: the first, and at half the epochs and three times later."""
    return epoch in (0, *(epochs * eighth // 8 for eighth in (4, 5, 6, 7)))


def learning_rate(epoch: int, epochs: int) -> float:
    """It falls with the repredictions."""
    phase = sum(predicts(one, epochs) for one in range(1, epoch + 1))
    return (0.12, 0.12, 0.08, 0.04, 0.004)[phase]


def predict(network: nn.Module, bank: ShardedPseudoLabelBank, digits: Digits, epoch: int) -> None:
    """(Re)prediction: this process's samples are dealt anew, and their pseudo-logits are what the network says of them."""
    own = bank.repartition(epoch)
    network.eval()
    with torch.no_grad():
        for images, index in DataLoader(Subset(digits.train, own), 512):
            bank.predict_(index, network(images))
    network.train()
