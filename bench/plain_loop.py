"""The baseline of the trainer: stage 2 as the reference implementation is organised, written from its description.

The bank is a parameter on the CPU with a row for every sample, labelled ones included; images are transformed one by one by
torchvision; the loss and the accuracy are read with ``.item()`` at every step.
"""

import copy
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from r2d2fast.train.config import Config


class _OneByOne(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, pixels: Tensor, translate: int) -> None:
        self.pixels = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
        channels = pixels.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(pixels.shape[2:], padding=translate),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * channels, [0.29] * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[sample])), sample


class PlainLoop:
    """Stage 2 with the recipe of ``config``.

    Args:
        pixels: uint8 ``[M, C, H, W]``.
        labels: int64 ``[M]``, −1 for an unlabelled sample.
        network: is copied.
    """

    def __init__(self, config: Config, pixels: Tensor, labels: Tensor, network: nn.Module) -> None:
        self.config = config
        self.data = _OneByOne(pixels, config.translate)
        self.labels = labels
        self.network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # PyTorch's default
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.05, 0.9, nesterov=True, weight_decay=2e-4)
        rows = torch.zeros(len(labels), 10)
        rows[labels >= 0] = config.label_scale * F.one_hot(labels[labels >= 0], 10)
        self.bank = nn.Parameter(rows)
        self.seen: list[tuple[float, float]] = []

    def run(self, steps: int) -> float:
        """Take so many steps; returns the seconds that the network's passes took."""
        inside = 0.0
        self.network.train()
        for images, index in DataLoader(self.data, batch_sampler=list(self._batches(steps))):
            began = time.perf_counter()
            logits = self.network(images)
            inside += time.perf_counter() - began
            leaf = logits.detach().requires_grad_()
            rows = self.bank[index].detach().requires_grad_()
            log_p, log_q = leaf.log_softmax(1), rows.log_softmax(1)
            divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
            entropy = -(log_p.exp() * log_p).sum(1).mean()
            loss = self.config.alpha * divergence + self.config.beta * entropy
            loss.backward()
            self.optimizer.zero_grad()
            began = time.perf_counter()
            logits.backward(leaf.grad)
            inside += time.perf_counter() - began
            self.optimizer.step()
            assert rows.grad is not None
            with torch.no_grad():
                unlabelled = self.labels[index] < 0
                self.bank[index[unlabelled]] -= self.config.label_lr * rows.grad[unlabelled]
                accuracy = (logits.argmax(1) == self.bank[index].argmax(1)).float().mean()
            self.seen.append((loss.item(), accuracy.item()))
        return inside

    def _batches(self, steps: int) -> Iterator[list[int]]:
        two = self.config.stage2
        labelled, unlabelled = (torch.nonzero(mask).flatten() for mask in (self.labels >= 0, self.labels < 0))
        for _ in range(steps):
            first = unlabelled[torch.randperm(len(unlabelled))[: two.unlabelled_batch]]
            second = labelled[torch.randperm(len(labelled))[: two.labelled_batch]]
            yield torch.cat([first, second]).tolist()
