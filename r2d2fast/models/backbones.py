"""Every backbone by name."""

import difflib
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from r2d2fast.models.batch_norm import with_bn_groups
from r2d2fast.models.conv_large import conv_large
from r2d2fast.models.heads import embedding_classifier
from r2d2fast.models.lenet import LeNet2D
from r2d2fast.models.libraries import LIBRARIES, library_model, library_names, torchvision_model
from r2d2fast.models.library_weights import load_weights
from r2d2fast.models.shake_shake import ShakeShake
from r2d2fast.models.small import CONV4, small_convnet
from r2d2fast.models.wide_resnet import WideResNet

_log = logging.getLogger("r2d2fast")


class Backbone(NamedTuple):
    """How to make a network.

    Attributes:
        build: called with (num_classes, in_channels, image_size) and the switches that are on; one of embeddings with
            (num_classes, features, hidden_layer_sizes, dropout, feature_length).
        smallest: height and width in pixels that it needs at least.
        multiple: of which height and width have to be a multiple.
        switches: that it has.
        embeddings: whether it takes embeddings instead of images.
    """

    build: Callable[..., nn.Module]
    smallest: int = 1
    multiple: int = 1
    switches: tuple[str, ...] = ()
    embeddings: bool = False


BACKBONES = {
    "small": Backbone(lambda classes, channels, size: small_convnet(channels, classes), smallest=4),
    "conv4": Backbone(lambda classes, channels, size: small_convnet(channels, classes, CONV4), smallest=8),
    "lenet2d": Backbone(LeNet2D, smallest=4),
    "convlarge": Backbone(
        lambda classes, channels, size, **switches: conv_large(classes, channels, **switches),
        smallest=12,
        switches=("input_noise", "weight_norm"),
    ),
    "wrn-28-2": Backbone(lambda classes, channels, size: WideResNet(classes, channels), smallest=4),
    "shake26-96": Backbone(lambda classes, channels, size: ShakeShake(classes, channels), smallest=4, multiple=4),
    "resnet18": Backbone(functools.partial(torchvision_model, "resnet18")),
    "linear": Backbone(
        lambda classes, features, hidden, *settings: embedding_classifier(classes, features, (), *settings),
        embeddings=True,
    ),
    "mlp": Backbone(embedding_classifier, embeddings=True),
}
"""Backbones with a name of their own; ``torchvision:NAME`` and ``timm:NAME`` are accepted beside them."""


def make_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    bn_groups: int = 1,
    input_noise: bool = False,
    weight_norm: bool = False,
    hidden_layer_sizes: Sequence[int] = (256,),
    dropout: float = 0.0,
    feature_length: float = 10.0,
    pretrained: Path | None = None,
) -> nn.Module:
    """The backbone ``name``, on the CPU, in training mode; initial values are drawn from torch's generator.

    The network takes float ``[B, in_channels, image_size, image_size]``, or embeddings, float ``[B, in_channels]``, and gives
    logits ``[B, num_classes]``.

    Args:
        name: of :data:`BACKBONES`; or ``torchvision:NAME``, a classification model of torchvision; or ``timm:NAME``, of timm.
        num_classes: N.
        in_channels: C, or the D numbers of an embedding. torchvision's networks get another first convolution where it is not 3.
        image_size: height and width in pixels; 0 for embeddings.
        bn_groups: parts of a batch that batch norm treats apart in training (:func:`with_bn_groups`).
        input_noise: ConvLarge only: noise of standard deviation 0.15 on the images in training.
        weight_norm: ConvLarge only: weight normalisation.
        hidden_layer_sizes: mlp only: the width of each hidden layer.
        dropout: linear and mlp only: the share of the features that each batch leaves out in training.
        feature_length: linear and mlp only: the length that each sample's features are scaled to.
        pretrained: a file of weights to start from (:func:`load_pretrained`, whose message goes to the log as a warning), or
            ``Path("default")``, those of torchvision or timm.

    Raises:
        ValueError: an unknown name, images where the backbone takes embeddings or the other way round, or of a size that it does
            not take, a switch or ``bn_groups`` that it does not
            have; PretrainedError, a ValueError too: a file that cannot be read or does not fit.
        ImportError: ``timm:NAME`` without timm.
    """
    backbone = _find(name)
    switches = {"input_noise": input_noise, "weight_norm": weight_norm}
    wanted = [switch for switch, on in switches.items() if on]
    for switch in wanted:
        if switch not in backbone.switches:
            owners = ", ".join(owner for owner, other in BACKBONES.items() if switch in other.switches)
            raise ValueError(f"backbone {name!r} has no switch {switch}; only {owners} has it")
    if backbone.embeddings != (image_size == 0):
        takes, given = ("embeddings", "images") if backbone.embeddings else ("images", "embeddings")
        others = ", ".join(other for other, one in BACKBONES.items() if one.embeddings != backbone.embeddings)
        raise ValueError(f"backbone {name!r} takes {takes}, and these are {given}; accepted: {others}")
    if not backbone.embeddings and (image_size < backbone.smallest or image_size % backbone.multiple):
        accepted = f"at least {backbone.smallest}" + f", a multiple of {backbone.multiple}" * (backbone.multiple > 1)
        raise ValueError(
            f"backbone {name!r} does not take images of {image_size}×{image_size} pixels; needed: {accepted}"
        )
    if backbone.embeddings:
        model = backbone.build(num_classes, in_channels, hidden_layer_sizes, dropout, feature_length)
    else:
        model = backbone.build(num_classes, in_channels, image_size, **dict.fromkeys(wanted, True))
    if pretrained is not None:
        message = load_weights(model, pretrained, name, image_size)
        if message is not None:
            _log.warning(message)
    return with_bn_groups(model, bn_groups)


def _find(name: str) -> Backbone:
    if name in BACKBONES:
        return BACKBONES[name]
    library, _, model_name = name.rpartition(":")
    if library in LIBRARIES and model_name in library_names(library):
        return Backbone(functools.partial(library_model, library, model_name))
    # Names that lack their library, too; timm's, of which there are a thousand, only where it was named.
    suggested_library = "timm" if library == "timm" else "torchvision"
    suggested = {other: f"{suggested_library}:{other}" for other in library_names(suggested_library)}
    suggested |= {other: other for other in BACKBONES}
    nearest = [suggested[match] for match in difflib.get_close_matches(model_name.lower(), suggested, n=1)]
    raise ValueError(
        f"unknown backbone {name!r}; "
        + "".join(f"the nearest is {match!r}; " for match in nearest)
        + f"accepted: {', '.join(BACKBONES)}, {', '.join(f'{library}:NAME' for library in LIBRARIES)}"
    )
