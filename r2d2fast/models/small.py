"""Small convolutional networks, fast on a CPU: ``small`` for images of 8 pixels or more, ``conv4`` for those of 16 or more."""

from collections.abc import Sequence

from torch import nn

SMALL, CONV4 = (16, 32, 64), (16, 32, 64, 128)
"""Channels of each convolution. On a CPU conv4 takes as long a step as small, and has four times as many parameters."""


def small_convnet(channels: int, num_classes: int, widths: Sequence[int] = SMALL) -> nn.Sequential:
    """A 3×3 convolution for each of ``widths``, with batch norm and ReLU, pooling between, average, linear.

    Input float ``[B, channels, H, W]``, H and W at least 2 to the number of convolutions less one; output logits
    ``[B, num_classes]``.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip((channels, *widths), widths, strict=False):
        if layers:
            layers.append(nn.MaxPool2d(2))
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
