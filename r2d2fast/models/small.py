"""A small convolutional network for 8×8 images, fast on a CPU."""

from torch import nn


def small_convnet(channels: int, num_classes: int) -> nn.Sequential:
    """Three 3×3 convolutions of 16, 32 and 64 channels with batch norm and ReLU, pooling between, average, linear.

    Input float ``[B, channels, H, W]``, H and W at least 4; output logits ``[B, num_classes]``.
    """

    def convolution(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    return nn.Sequential(
        convolution(channels, 16),
        nn.MaxPool2d(2),
        convolution(16, 32),
        nn.MaxPool2d(2),
        convolution(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
