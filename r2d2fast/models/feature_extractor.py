"""Pretrained networks of torchvision and timm without their classifier: what they make of an image are its features."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torchvision
from torch import nn

from r2d2fast.models.libraries import LIBRARIES, library_names, timm_model, torchvision_model
from r2d2fast.models.pretrained import classifier_name, load_pretrained


class FeatureExtractor(NamedTuple):
    """A network and the images that it wants.

    Attributes:
        network: takes float ``[B, 3, image_size, image_size]`` and gives features ``[B, D]``; in eval mode, on the CPU.
        image_size: side of the square that it sees, in pixels.
        resize: what the short side of an image is resized to before the square is cut from its centre.
        interpolation: of that, ``bilinear`` or ``bicubic``.
        mean, std: of each channel, in units of the full range, with which its images are normalised.
    """

    network: nn.Module
    image_size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def make_feature_extractor(name: str, pretrained: Path | None, image_size: int | None = None) -> FeatureExtractor:
    """The network ``name`` with pretrained weights, its last layer, the classifier, left out.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        pretrained: a file of its weights (:func:`load_pretrained`), classifier included; None: those of the library, which it
            downloads if it has not before.
        image_size: another one than the network's own; the short side is then resized in proportion.

    Raises:
        ValueError: an unknown name, weights that cannot be had or, PretrainedError, read, or do not fit.
        ImportError: ``timm:NAME`` without timm.
    """
    library, _, model_name = name.partition(":")
    if library not in LIBRARIES:
        raise ValueError(f"{name!r} is no network of torchvision or timm; accepted: torchvision:NAME, timm:NAME")
    # timm's names may have the tag of their weights behind a dot.
    known = library_names(library)
    if model_name.partition(".")[0] not in known:
        nearest = difflib.get_close_matches(model_name.lower(), known, n=1)
        raise ValueError(
            f"{library} has no network {model_name!r}" + "".join(f"; the nearest is {one!r}" for one in nearest)
        )
    make = _of_torchvision if library == "torchvision" else _of_timm
    try:
        extractor = make(model_name, pretrained, image_size)
    except Exception as error:
        if pretrained is not None:
            raise ValueError(f"{name}: {error}") from error
        raise ValueError(
            f"the weights of {name} cannot be downloaded ({error!r:.300}); download them elsewhere and name the file, "
            "--pretrained FILE"
        ) from error
    if pretrained is not None:
        load_pretrained(extractor.network, pretrained)
    if library == "timm":
        extractor.network.reset_classifier(0)  # type: ignore[operator]
    else:
        extractor.network.set_submodule(classifier_name(extractor.network), nn.Identity())
    extractor.network.eval().requires_grad_(False)
    return extractor


def _of_torchvision(name: str, pretrained: Path | None, image_size: int | None) -> FeatureExtractor:
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    wanted = weights.transforms()
    (own_size,), (own_resize,) = wanted.crop_size, wanted.resize_size
    size = image_size or own_size
    if pretrained is None:
        network = torchvision.models.get_model(name, weights=weights)
    else:
        network = torchvision_model(name, len(weights.meta["categories"]), 3, size)
    resize = max(size, round(own_resize * size / own_size))
    interpolation: Literal["bilinear", "bicubic"] = "bicubic" if wanted.interpolation.value == "bicubic" else "bilinear"
    return FeatureExtractor(network, size, resize, interpolation, tuple(wanted.mean), tuple(wanted.std))


def _of_timm(name: str, pretrained: Path | None, image_size: int | None) -> FeatureExtractor:
    import timm

    known = timm.get_pretrained_cfg(name)
    own: dict[str, Any] = {} if known is None else known.to_dict()
    size = image_size or own.get("input_size", (3, 224, 224))[1]
    if pretrained is None:
        options: dict[str, Any] = {"img_size": size} if own.get("fixed_input_size") else {}
        network = timm.create_model(name, pretrained=True, **options)
    else:
        network = timm_model(name, own.get("num_classes", 1000), 3, size)
    wanted = timm.data.resolve_model_data_config(network)
    resize = math.floor(size / wanted["crop_pct"])
    interpolation: Literal["bilinear", "bicubic"] = "bicubic" if wanted["interpolation"] == "bicubic" else "bilinear"
    return FeatureExtractor(network, size, resize, interpolation, wanted["mean"], wanted["std"])
