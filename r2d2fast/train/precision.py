"""In which numbers the network computes."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from r2d2fast.train.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """Autocast of the network, and the scale of its gradients where they are float16.

    Args:
        name: float32, bfloat16, float16 or auto.
        device: where the network is.

    Attributes:
        name: what ``auto`` has become, too.

    Raises ConfigError for what the device does not have.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            name = "float32"
            if device.type == "cuda":
                name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError(
                f"--precision bfloat16: {torch.cuda.get_device_name(device)} has none; accepted: float16, float32"
            )
        self.name = name
        self.dtype = DTYPES[name]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self._one = torch.ones((), device=device)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scale(self) -> Tensor | float:
        """What the loss has to be multiplied by, on the device where it is not 1; the host does not wait for it."""
        return self.scaler.scale(self._one) if self.scaler.is_enabled() else 1.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimizer, left out where a scaled gradient has overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()
