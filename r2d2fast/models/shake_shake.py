"""Shake-Shake-26 2x96d (Gastaldi, 2017), as the reference implementation has it: the paper's network for CIFAR-10."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2d2fast.models.initial import he_normal_

BLOCKS = 4


class ShakeShake(nn.Module):
    """A residual network of 26 layers whose two branches are mixed at random.

    3×3 convolution of 16 channels; three stages of four blocks with ``width``, 2·``width`` and 4·``width`` channels, the second
    and third at half the resolution; average; linear. No ReLU between the last addition and the average (reference
    implementation).

    Input float ``[B, in_channels, H, W]``, H and W multiples of 4; output logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages = []
        inputs = 16
        for stage in range(3):
            outputs = width * 2**stage
            first = Block(inputs, outputs, halve=stage > 0)
            stages.append(nn.Sequential(first, *(Block(outputs, outputs, halve=False) for _ in range(BLOCKS - 1))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, num_classes)
        he_normal_(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.stem(images))
        # Over all places: with images of 32×32, an average over 8×8.
        return self.linear(features.mean((2, 3)))


class Block(nn.Module):
    """skip(x) + gate·left(x) + (1 − gate)·right(x), with a gate of its own for every sample; ½ in eval mode."""

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.left = branch(inputs, outputs, halve)
        self.right = branch(inputs, outputs, halve)
        self.skip: nn.Module
        if halve:
            self.skip = ShiftedSkip(inputs, outputs)
        elif inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        else:
            self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # The ReLU with which both branches begin, once.
        active = F.relu(x)
        left, right = self.left(active), self.right(active)
        if not self.training:
            return self.skip(x) + torch.lerp(right, left, 0.5)
        gates = torch.rand(2, len(x), 1, 1, 1, device=x.device).to(left.dtype)
        return self.skip(x) + Shake.apply(left, right, gates[0], gates[1])


def branch(inputs: int, outputs: int, halve: bool) -> nn.Sequential:
    """Two 3×3 convolutions with batch norm and a ReLU between; the ReLU before the first is the block's."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2 if halve else 1, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Shake(torch.autograd.Function):
    """gate·left + (1 − gate)·right, whose gradient is that of another, independent gate."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, forward_gate: Tensor, backward_gate: Tensor) -> Tensor:
        return torch.lerp(right, left, forward_gate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        to_left = gate * grads[0]
        return to_left, grads[0] - to_left, None, None


class ShiftedSkip(nn.Module):
    """Half the resolution without losing every other pixel of the diagonal: two grids of pixels, one shifted by (1, 1).

    Their channels one after the other, ReLU, 1×1 convolution in two groups, one a grid, batch norm. H and W must be even.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2 * inputs, outputs, 1, groups=2)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        grids = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2]], dim=1)
        return self.norm(self.convolution(F.relu(grids)))
