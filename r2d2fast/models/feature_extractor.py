"""Pretrained networks of torchvision and timm without their classifier: what they make of an image are its features."""

import difflib
from pathlib import Path
from typing import NamedTuple

from torch import nn

from r2d2fast.models.libraries import LIBRARIES, library_names, timm_model, torchvision_model
from r2d2fast.models.library_weights import DEFAULT, OwnImages, load_weights, own_classes, own_images
from r2d2fast.models.pretrained import classifier_name


class FeatureExtractor(NamedTuple):
    """A network, which takes float ``[B, 3, image_size, image_size]`` and gives features ``[B, D]``, in eval mode, on the CPU;
    and the images that it wants."""

    network: nn.Module
    images: OwnImages


def make_feature_extractor(name: str, pretrained: Path | None, image_size: int | None = None) -> FeatureExtractor:
    """The network ``name`` with pretrained weights, its last layer, the classifier, left out.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        pretrained: a file of its weights (:func:`r2d2fast.models.load_pretrained`), classifier included; None: those of the
            library, which it downloads if it has not before.
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
    images = own_images(name, image_size)
    assert images is not None
    make = torchvision_model if library == "torchvision" else timm_model
    try:
        network = make(model_name, own_classes(name), 3, images.image_size)
    except Exception as error:
        raise ValueError(f"{name}: {error}") from error
    load_weights(network, DEFAULT if pretrained is None else pretrained, name, images.image_size)
    if library == "timm":
        network.reset_classifier(0)  # type: ignore[operator]
    else:
        network.set_submodule(classifier_name(network), nn.Identity())
    network.eval().requires_grad_(False)
    return FeatureExtractor(network, images)
