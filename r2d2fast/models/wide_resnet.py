"""WRN-28-2 (Zagoruyko & Komodakis, BMVC 2016), with which semi-supervised methods are compared (Oliver et al., NeurIPS 2018)."""

import torch.nn.functional as F
from torch import Tensor, nn

from r2d2fast.models.initial import he_normal_

SLOPE = 0.1
BLOCKS = 4


class WideResNet(nn.Module):
    """A residual network of 28 layers and 1.5 million parameters, norm and leaky ReLU before each convolution.

    3×3 convolution of 16 channels; three stages of four blocks with 16, 32 and 64 times ``width`` channels, the second and third
    at half the resolution; norm, leaky ReLU, average, linear.

    Input float ``[B, in_channels, H, W]``, H and W at least 4; output logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * width * 2**stage
            for number in range(BLOCKS):
                blocks.append(Block(inputs, outputs, stride=2 if stage and not number else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)
        he_normal_(self, SLOPE)

    def forward(self, images: Tensor) -> Tensor:
        features = F.leaky_relu(self.norm(self.blocks(self.stem(images))), SLOPE)
        return self.linear(features.mean((2, 3)))


class Block(nn.Module):
    """skip(x) + conv(act(conv(act(x)))); where the number of channels changes, the skip is a 1×1 convolution of act(x)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.leaky_relu(self.norm1(x), SLOPE)
        features = self.conv2(F.leaky_relu(self.norm2(self.conv1(activated)), SLOPE))
        return features + (x if self.skip is None else self.skip(activated))
