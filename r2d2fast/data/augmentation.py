"""Augmentation of whole batches as tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def translate(images: Tensor, pixels: int, fill: float, generator: torch.Generator) -> Tensor:
    """Shift each image by its own whole number of pixels, −``pixels`` … ``pixels``, independently down and right.

    Args:
        images: ``[B, C, H, W]``, any dtype.
        pixels: largest shift; 0 returns the images.
        fill: value of the pixels that come in at the border.
        generator: on the device of ``images``.

    Returns:
        ``[B, C, H, W]``, a new tensor.
    """
    if pixels == 0:
        return images
    batch, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (pixels, pixels, pixels, pixels), value=fill)
    top, left = torch.randint(0, 2 * pixels + 1, (2, batch, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    samples = torch.arange(batch, device=device)
    # Indexed channels last and turned back: the channel axis then needs no index of its own.
    return padded.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
