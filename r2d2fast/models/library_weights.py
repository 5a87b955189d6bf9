"""The pretrained weights of torchvision and timm: the images that they were trained with, and where they are."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from r2d2fast.models.libraries import LIBRARIES, library_names, torchvision_model
from r2d2fast.models.pretrained import PretrainedError, fit_weights, load_pretrained

DEFAULT = Path("default")
"""In place of a file: the library's own weights."""
# Backbones with a name of their own that are a library's.
_FULL_NAMES = {"resnet18": "torchvision:resnet18"}


class OwnImages(NamedTuple):
    """The images that a pretrained network wants.

    Attributes:
        image_size: side of the square that it sees, in pixels.
        resize: what the short side of an image is resized to before the square is cut from its centre.
        interpolation: of that, ``bilinear`` or ``bicubic``.
        mean, std: of each channel, in units of the full range, with which its images are normalised.
    """

    image_size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def own_images(name: str, image_size: int | None = None) -> OwnImages | None:
    """Those of the default weights of ``torchvision:NAME`` or ``timm:NAME``, which need not be there; None for other networks,
    and for names that there are not, which :func:`make_model` tells. ImportError says how to get timm.

    ``image_size``: another one than the network's own; the short side is then resized in proportion.
    """
    library, _, model_name = _FULL_NAMES.get(name, name).partition(":")
    if library not in LIBRARIES or model_name not in library_names(library):
        return None
    if library == "torchvision":
        wanted = torchvision.models.get_model_weights(model_name)["DEFAULT"].transforms()
        (own_size,), (own_resize,) = wanted.crop_size, wanted.resize_size
        size = image_size or own_size
        resize = max(size, round(own_resize * size / own_size))
        return OwnImages(size, resize, _filter(wanted.interpolation.value), tuple(wanted.mean), tuple(wanted.std))
    import timm

    config = timm.data.resolve_data_config(pretrained_cfg=_timm_config(model_name))
    size = image_size or config["input_size"][1]
    resize = math.floor(size / config["crop_pct"])
    return OwnImages(size, resize, _filter(config["interpolation"]), config["mean"], config["std"])


def _filter(name: str) -> Literal["bilinear", "bicubic"]:
    return "bicubic" if name == "bicubic" else "bilinear"


def own_classes(name: str) -> int:
    """Of how many classes the default weights of ``torchvision:NAME`` or ``timm:NAME`` are."""
    library, _, model_name = name.partition(":")
    if library == "torchvision":
        return len(torchvision.models.get_model_weights(model_name)["DEFAULT"].meta["categories"])
    return _timm_config(model_name).get("num_classes", 1000)


def _timm_config(name: str) -> dict[str, Any]:
    import timm

    known = timm.get_pretrained_cfg(name)
    return {} if known is None else known.to_dict()


def load_weights(model: nn.Module, pretrained: Path, name: str, image_size: int) -> str | None:
    """:func:`load_pretrained`, or for :data:`DEFAULT` the library's own weights of the backbone ``name``."""
    if pretrained != DEFAULT:
        return load_pretrained(model, pretrained)
    return fit_weights(model, _library_weights(name, image_size), f"those of {name}")


def _library_weights(name: str, image_size: int) -> dict[str, Tensor]:
    """From the library's cache, or else from its server. Raises PretrainedError, with the file's address and place, where they
    are in neither."""
    library, _, model_name = _FULL_NAMES.get(name, name).partition(":")
    if library not in LIBRARIES:
        raise PretrainedError(
            f"backbone {name!r} has no weights of its own; accepted: torchvision:NAME, timm:NAME, a FILE"
        )
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(model_name)["DEFAULT"]
        place = f"{torch.hub.get_dir()}/checkpoints/{weights.url.rpartition('/')[2]}"
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise PretrainedError(_missing(name, error, weights.url, place)) from error
        ours = torchvision_model(model_name, own_classes(f"{library}:{model_name}"), 3, image_size).state_dict()
        # Those of auxiliary classifiers, which we do without.
        return {key: tensor for key, tensor in state.items() if key in ours or not key.startswith(("aux", "Aux"))}
    import timm

    config = _timm_config(model_name)
    address, place = config.get("url") or "", f"{torch.hub.get_dir()}/checkpoints"
    if hub := config.get("hf_hub_id"):
        tag = config.get("tag")
        hub = f"{hub}{model_name.partition('.')[0]}.{tag}" if hub.endswith("/") else hub
        address, place = f"https://huggingface.co/{hub}/resolve/main/model.safetensors", "the cache of huggingface_hub"
    options: dict[str, Any] = {"img_size": image_size} if config.get("fixed_input_size") else {}
    try:
        network: nn.Module = timm.create_model(model_name, pretrained=True, **options)
    except Exception as error:  # of the library's own kinds, and those of the libraries that it downloads with
        raise PretrainedError(_missing(name, error, address, place)) from error
    return network.state_dict()


def _missing(name: str, error: Exception, address: str, place: str) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"the weights of {name} cannot be downloaded ({reason:.200}): fetch {address} elsewhere, and put it into {place}, or "
        "name the file, --pretrained FILE"
    )
