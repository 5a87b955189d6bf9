"""Backbones of torchvision and timm, for any number of classes and input channels and one size of images."""

import math
from typing import Any

import torch
import torchvision
from torch import nn

LIBRARIES = ("torchvision", "timm")


def library_names(library: str) -> list[str]:
    """The classification models that ``library`` has; ImportError says how to get timm."""
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    try:
        import timm
    except ImportError as error:
        raise ImportError("backbones timm:NAME need timm: pip install 'r2d2fast[timm]'") from error
    return timm.list_models()


def library_model(library: str, name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The model ``name`` of ``library``, tried on one image, with its own initial values.

    Raises ValueError, with the library's own reason, for images that it does not take.
    """
    build = {"torchvision": torchvision_model, "timm": timm_model}[library]
    asked = f"backbone '{library}:{name}' for {in_channels}×{image_size}×{image_size} images"
    try:
        model = build(name, num_classes, in_channels, image_size)
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, in_channels, image_size, image_size))
    except Exception as error:  # of any type: asserts, shapes that do not fit, arguments unknown
        raise ValueError(f"{asked} does not work: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise ValueError(f"{asked} does not work: its output is not one row of {num_classes} logits for each image")
    return model.train()


def torchvision_model(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """torchvision's model, without auxiliary classifiers."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        replace_first_convolution(model, in_channels)
    return model


def replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Make the first convolution one for ``in_channels``, with normal weights and responses of the same variance as before."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    size: Any = old.kernel_size
    stride: Any = old.stride
    padding: Any = old.padding
    new = nn.Conv2d(in_channels, old.out_channels, size, stride, padding, bias=False)
    with torch.no_grad():
        new.weight.normal_(std=old.weight.std().item() * math.sqrt(old.in_channels / in_channels))
    new.bias = old.bias
    model.set_submodule(name, new)


def timm_model(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """timm's model, for the size of images where that is fixed."""
    import timm

    known = timm.get_pretrained_cfg(name)
    # Only models that are made for one size of images know the argument.
    options: dict[str, Any] = {"img_size": image_size} if known is not None and known.fixed_input_size else {}
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options)
