"""ConvLarge, the 13-layer network of the semi-supervised field (Laine & Aila, ICLR 2017); CIFAR-100 and SVHN in the paper."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from r2d2fast.models.initial import he_normal_

SLOPE = 0.1
NOISE = 0.15


class InputNoise(nn.Module):
    """Adds N(0, :data:`NOISE`²) to every value in training; in eval mode images pass unchanged."""

    def forward(self, images: Tensor) -> Tensor:
        return images + NOISE * torch.randn_like(images) if self.training else images


def conv_large(
    num_classes: int, in_channels: int, input_noise: bool = False, weight_norm: bool = False
) -> nn.Sequential:
    """Three 3×3 convolutions of 128, three of 256, then 512 (3×3 valid), 256 and 128 (1×1), average, linear.

    Batch norm and leaky ReLU 0.1 follow each convolution, 2×2 maximum pooling and dropout ½ the third and the sixth.

    Input float ``[B, in_channels, H, W]``, H and W at least 12; output logits ``[B, num_classes]``.

    Args:
        input_noise: noise of standard deviation 0.15 on the images in training (Laine & Aila).
        weight_norm: learn length and direction of each weight vector apart (Salimans & Kingma, 2016), in every convolution
            and the linear layer; it changes the keys of the ``state_dict``.
    """

    def convolution(inputs: int, outputs: int, size: int, padding: int = 0) -> list[nn.Module]:
        # No bias: the batch norm would take it away again.
        return [
            nn.Conv2d(inputs, outputs, size, padding=padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]

    network = nn.Sequential(
        *([InputNoise()] if input_noise else []),
        *convolution(in_channels, 128, 3, padding=1),
        *convolution(128, 128, 3, padding=1),
        *convolution(128, 128, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        *convolution(128, 256, 3, padding=1),
        *convolution(256, 256, 3, padding=1),
        *convolution(256, 256, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        *convolution(256, 512, 3),
        *convolution(512, 256, 1),
        *convolution(256, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )
    he_normal_(network, SLOPE)
    if weight_norm:
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                parametrizations.weight_norm(layer)
    return network
