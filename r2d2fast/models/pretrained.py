"""Weights from a file, for a network to start from."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")
NESTED = ("state_dict", "model")
SHOWN = 5


class PretrainedError(ValueError):
    """A file of weights cannot be read, or does not fit the network; the message names the file and the keys."""


def load_pretrained(model: nn.Module, path: Path) -> str | None:
    """Load the weights in ``path`` into ``model``; nothing is loaded unless all of them fit.

    Args:
        model: in whose ``state_dict`` every key of the file is to be, and the other way round.
        path: ``.safetensors``, or ``.pt`` / ``.pth``: a ``state_dict`` saved by ``torch.save``, alone or under the key
            ``state_dict`` or ``model``. Keys may all begin with ``module.``, as those of a network within DDP.

    Returns:
        None; or where the file's classifier, the last linear layer or convolution, is for another number of classes, a message
        which says that it was left at its initial values.

    Raises:
        PretrainedError: the file cannot be read, holds no weights, or other weights than the network's.
    """
    return fit_weights(model, _read(path), str(path))


def fit_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> str | None:
    """:func:`load_pretrained` of weights that have been read, from ``source``."""
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): tensor for key, tensor in weights.items()}
    own: dict[str, Tensor] = model.state_dict()
    other_shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    message = None
    classifier = classifier_name(model) + "."
    if other_shapes and all(
        key.startswith(classifier) and own[key].shape[1:] == weights[key].shape[1:] for key in other_shapes
    ):
        theirs, ours = weights[other_shapes[0]].shape[0], own[other_shapes[0]].shape[0]
        message = (
            f"{source}: its classifier is for {theirs} classes, this network's for {ours}: {classifier.removesuffix('.')} "
            "was left at its initial values"
        )
        other_shapes = []
        weights |= {key: tensor for key, tensor in own.items() if key.startswith(classifier)}
    problems = {
        # PyTorch before 0.4.1 did not count batches; what counts is only used with momentum None.
        "missing": [key for key in own if key not in weights and not key.endswith("num_batches_tracked")],
        "unknown": [key for key in weights if key not in own],
        "of another shape": [f"{key} {_shape(weights[key])} for {_shape(own[key])}" for key in other_shapes],
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise PretrainedError(
            f"the weights in {source} do not fit this network: {said}. Take those of this very backbone, for images of as "
            "many channels"
        )
    model.load_state_dict(own | weights)
    return message


def classifier_name(model: nn.Module) -> str:
    """The name of the last linear layer or convolution."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise PretrainedError(f"{path} is no file of weights by its name; accepted: {', '.join(SUFFIXES)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PretrainedError(
            f"{path} is damaged, or holds more than tensors, which could run any code: save model.state_dict(), not the model"
        ) from error
    except Exception as error:  # what the readers raise over bytes that are not theirs is of any type
        raise PretrainedError(
            f"{path} is damaged or of another format: {len(content)} bytes, {error!r:.200}"
        ) from error
    return _state_dict(path, saved)


def _state_dict(path: Path, saved: Any) -> dict[str, Tensor]:
    """The part of what ``torch.save`` wrote that is a ``state_dict``."""
    if isinstance(saved, Mapping):
        inner = next((saved[key] for key in NESTED if isinstance(saved.get(key), Mapping)), saved)
        if inner and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items()):
            return dict(inner)
        found = f"a dictionary of {_some([str(key) for key in inner])}" if inner else "an empty dictionary"
    else:
        found = f"a {type(saved).__name__}"
    raise PretrainedError(f"{path} holds {found}, no state_dict, nor one under {' or '.join(map(repr, NESTED))}")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
