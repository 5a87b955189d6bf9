"""Initial values of the convolutions of networks that are trained from scratch."""

from torch import nn


def he_normal_(network: nn.Module, slope: float = 0.0) -> None:
    """Draw every convolution's weights from N(0, 2 / ((1 + slope²)·outputs·k²)), in the order of the modules (He et al., 2015).

    The fan is that of the outputs, so that gradients keep their size on the way back. ``slope``: of the leaky ReLU.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=slope, mode="fan_out")
