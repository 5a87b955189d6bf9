import pytest
import torch
from torch import nn

from r2d2fast.models.conv_large import InputNoise, conv_large


def test_the_layers_are_those_of_the_paper_s_network():
    network, seen = conv_large(num_classes=10, in_channels=3), []
    for layer in network:
        layer.register_forward_hook(lambda layer, _, output: seen.append((type(layer).__name__, *output.shape[1:])))
    network.eval()(torch.randn(1, 3, 32, 32))

    def convolutions(channels, side):
        return [(name, channels, side, side) for name in ("Conv2d", "BatchNorm2d", "LeakyReLU")]

    assert seen == [
        *(*convolutions(128, 32) * 3, ("MaxPool2d", 128, 16, 16), ("Dropout", 128, 16, 16)),
        *(*convolutions(256, 16) * 3, ("MaxPool2d", 256, 8, 8), ("Dropout", 256, 8, 8)),
        *(*convolutions(512, 6), *convolutions(256, 6), *convolutions(128, 6)),
        *(("AdaptiveAvgPool2d", 128, 1, 1), ("Flatten", 128), ("Linear", 10)),
    ]
    assert [layer.kernel_size for layer in network if isinstance(layer, nn.Conv2d)] == [(3, 3)] * 7 + [(1, 1)] * 2
    assert {layer.negative_slope for layer in network if isinstance(layer, nn.LeakyReLU)} == {0.1}
    assert {layer.p for layer in network if isinstance(layer, nn.Dropout)} == {0.5}


def test_input_noise_has_standard_deviation_015_and_is_fresh_in_every_step():
    noise = InputNoise()
    images = torch.rand(100, 3, 32, 32)
    first, second = noise(images) - images, noise(images) - images
    for added in (first, second):
        assert added.mean().abs() < 0.002
        assert added.std().item() == pytest.approx(0.15, rel=0.01)
    assert not torch.equal(first, second)
    assert torch.equal(noise.eval()(images), images)


def test_weight_norm_splits_every_weight_into_length_and_direction_and_changes_no_output():
    torch.manual_seed(1)
    plain = conv_large(10, 3).eval()
    torch.manual_seed(1)
    normed = conv_large(10, 3, weight_norm=True).eval()
    weighted = [layer for layer in normed if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 10
    for layer in weighted:
        length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        assert length.shape == (len(layer.weight), *[1] * (layer.weight.dim() - 1))
        torch.testing.assert_close(layer.weight, length * direction / direction.flatten(1).norm(dim=1).view_as(length))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(normed(images), plain(images))
