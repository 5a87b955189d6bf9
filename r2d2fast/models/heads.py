"""Classifiers of embeddings. They take raw embeddings: what scales the features is a part of the network, and stored with it."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class FeatureScaling(nn.Module):
    """Standardise each feature, then scale each sample to the same ``length``: float ``[B, D]`` to float32 ``[B, D]``.

    Buffers, stored with the network's weights: ``mean`` and ``std``, ``[D]``, which :meth:`set_statistics` sets to those of the
    training samples, and ``length``, a scalar.
    """

    mean: Tensor
    std: Tensor
    length: Tensor

    def __init__(self, features: int, length: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("length", torch.tensor(length))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Of each feature of the training samples, ``[D]``, each ``std`` above 0."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, embeddings: Tensor) -> Tensor:
        standardised = (embeddings.float() - self.mean).mul_(1 / self.std)
        norm = torch.linalg.vector_norm(standardised, dim=1, keepdim=True)
        return standardised * (self.length / norm.clamp_min(1e-12))


class LinearOfSomeFeatures(nn.Linear):
    """A linear layer that in training leaves out features, the same for all samples of a batch: ``[B, D]`` to ``[B, outputs]``.

    They are drawn anew for each batch, and the others are scaled up as dropout does. What is left out is not multiplied, and the
    gradient of its weights is zero: with half of the features the matrix products of a step are half. In evaluation it is
    ``nn.Linear``.

    Args:
        inputs: D.
        outputs: how many numbers it gives of each sample.
        dropout: the share of the features that is left out, 0 to below 1.

    Attributes:
        kept: how many features each batch has, at least 1; always as many, so that a GPU need not tell the host.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__(inputs, outputs)
        self.kept = max(inputs - round(dropout * inputs), 1)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.kept == self.in_features:
            return super().forward(input)
        columns = torch.randperm(self.in_features, device=input.device)[: self.kept]
        some = input.index_select(1, columns) * (self.in_features / self.kept)
        return nn.functional.linear(some, self.weight.index_select(1, columns), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.kept}"


def embedding_classifier(
    num_classes: int, features: int, hidden_layer_sizes: Sequence[int], dropout: float, feature_length: float
) -> nn.Sequential:
    """Feature scaling, then linear layers with ReLU between: logits ``[B, num_classes]`` of embeddings ``[B, features]``.

    The first of them leaves out the share ``dropout`` of the features. There is no dropout between the layers: on the digits it
    made all samples one class.
    """
    layers: list[tuple[str, nn.Module]] = [("scaling", FeatureScaling(features, feature_length))]
    sizes = [features, *hidden_layer_sizes, num_classes]
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        linear = LinearOfSomeFeatures(inputs, outputs, dropout) if number == 1 else nn.Linear(inputs, outputs)
        if number == len(sizes) - 1:
            layers.append(("classifier", linear))
        else:
            layers += [(f"hidden{number}", linear), (f"relu{number}", nn.ReLU())]
    return nn.Sequential(OrderedDict(layers))
