import logging
import sys
import warnings
from itertools import product

import pytest
import torch
import torchvision
from torch import nn

from r2d2fast.models import BACKBONES, export_safetensors, make_model
from r2d2fast.models.batch_norm import GroupedBatchNorm2d
from r2d2fast.models.conv_large import InputNoise

SIZES = {"small": 8, "conv4": 16, "lenet2d": 28, "convlarge": 32, "wrn-28-2": 32, "shake26-96": 32, "resnet18": 64}
EMBEDDINGS = ["linear", "mlp"]  # test_heads.py


@pytest.fixture(scope="module")
def networks():
    """Every backbone with a name of its own, for 3 channels and 10 classes."""
    assert list(BACKBONES) == [*SIZES, *EMBEDDINGS]
    torch.manual_seed(0)
    return {name: make_model(name, 10, 3, size) for name, size in SIZES.items()}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "count"),
    [
        ("small", 10, 1, 8, 24_058),
        ("conv4", 10, 3, 32, 98_970),
        ("lenet2d", 10, 1, 28, 61_056),
        ("convlarge", 10, 3, 32, 3_121_802),
        ("convlarge", 100, 3, 32, 3_133_412),
        ("wrn-28-2", 10, 3, 32, 1_467_610),
        ("shake26-96", 10, 3, 32, 26_193_466),
        # torchvision's own figure, of its table of weights.
        ("resnet18", 1000, 3, 224, 11_689_512),
        ("torchvision:resnet50", 1000, 3, 64, 25_557_032),
    ],
)
def test_numbers_of_parameters(name, classes, channels, size, count):
    network = make_model(name, classes, channels, size)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_logits_and_gradients_for_every_parameter_and_the_same_logits_in_any_batch_or_layout(networks, name):
    network, images = networks[name].train(), torch.randn(4, 3, SIZES[name], SIZES[name])
    logits = network(images)
    assert logits.shape == (4, 10)
    network.zero_grad()
    logits.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    network.eval()
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(network(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
        network.to(memory_format=torch.channels_last)
        result = network(images.contiguous(memory_format=torch.channels_last))
        network.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_weights_and_the_state_dict_carries_them(networks, name):
    def made(seed):
        torch.manual_seed(seed)
        return make_model(name, 10, 3, SIZES[name])

    first, second, other = made(7), made(7), made(8)
    assert all(module.training for module in first.modules())
    states = [network.state_dict() for network in (first, second, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    images = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.no_grad():
        expected = first.eval()(images)
        assert not torch.equal(other.eval()(images), expected)
        other.load_state_dict(states[0])
        assert torch.equal(other(images), expected)


def test_the_smallest_and_odd_sizes_work_and_others_are_refused():
    accepted = {"small": (4, 32), "conv4": (8, 33), "convlarge": (12,), "shake26-96": (4,), "lenet2d": (4, 11, 12, 33)}
    for name, sizes in accepted.items():
        for size in sizes:
            assert make_model(name, 10, 3, size)(torch.randn(2, 3, size, size)).shape == (2, 10)
    for name, size, needed in (
        *(
            ("small", 3, "at least 4"),
            ("conv4", 7, "at least 8"),
            ("lenet2d", 3, "at least 4"),
            ("convlarge", 8, "at least 12"),
        ),
        *(("shake26-96", 30, "at least 4, a multiple of 4"), ("resnet18", -1, "at least 1")),
    ):
        message = rf"'{name}' does not take images of {size}×{size} pixels; needed: {needed}$"
        with pytest.raises(ValueError, match=message):
            make_model(name, 10, 3, size)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("convlarg", "'convlarge'"),
        ("LeNet", "'lenet2d'"),
        ("resnet50", "'torchvision:resnet50'"),
        ("torchvision:resnet49", "'torchvision:resnet"),
        ("torchvision:convlarge", "'convlarge'"),
        ("other:resnet18", "'resnet18'"),
        ("xyzzyx", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_the_accepted_ones(name, nearest):
    accepted = "accepted: small, conv4, lenet2d, convlarge, wrn-28-2, shake26-96, resnet18, linear, mlp, "
    accepted += "torchvision:NAME, timm:NAME"
    suggested = f" the nearest is {nearest}.*;" if nearest else ""
    with pytest.raises(ValueError, match=f"unknown backbone '{name}';{suggested} {accepted}"):
        make_model(name, 10, 3, 32)


@pytest.mark.parametrize(("input_noise", "weight_norm"), [(True, True), (True, False), (False, True)])
def test_switches_of_convlarge(input_noise, weight_norm):
    network = make_model("convlarge", 10, 3, 32, input_noise=input_noise, weight_norm=weight_norm)
    assert [number for number, layer in enumerate(network) if isinstance(layer, InputNoise)] == [0] * input_noise
    assert hasattr(network[input_noise], "parametrizations") == weight_norm
    for other, switch in product(("small", "torchvision:resnet18"), ("input_noise", "weight_norm")):
        with pytest.raises(ValueError, match=f"'{other}' has no switch {switch}; only convlarge has it"):
            make_model(other, 10, 3, 32, **{switch: True})


@pytest.mark.parametrize("name", [name for name in SIZES if name != "lenet2d"])  # which has no batch norm
def test_bn_groups(name):
    network = make_model(name, 10, 3, 32, bn_groups=4)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {(type(norm), norm.groups) for norm in norms} == {(GroupedBatchNorm2d, 4)}


@pytest.mark.parametrize(("name", "gain", "count"), [("convlarge", 2 / (1 + 0.1**2), 9), ("shake26-96", 2, 52)])
def test_initial_values_keep_the_size_of_gradients(networks, name, gain, count):
    layers = [module for module in networks[name].modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == count  # Shake-Shake: the stem, the two branches of twelve blocks, three skips
    for layer in layers:
        expected = (gain / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
        # Four standard deviations of the estimate.
        assert layer.weight.std().item() == pytest.approx(expected, rel=4 / (2 * layer.weight.numel()) ** 0.5)


def test_pretrained_weights_are_loaded_and_a_message_goes_to_the_log(tmp_path, caplog):
    source = make_model("small", 10, 1, 8)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(export_safetensors(source, {}))
    with caplog.at_level(logging.WARNING):
        same = make_model("small", 10, 1, 8, pretrained=path, bn_groups=2)
        assert caplog.text == ""
        other = make_model("small", 7, 1, 8, pretrained=path)
    assert "its classifier is for 10 classes, this network's for 7" in caplog.text
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in same.state_dict().items())
    assert torch.equal(other[0][0].weight, source[0][0].weight)


TIMM = pytest.mark.extra("timm")


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        *(("resnet18", 1, 32), ("torchvision:mobilenet_v3_small", 1, 32), ("torchvision:googlenet", 3, 64)),
        pytest.param("torchvision:densenet121", 4, 32, marks=pytest.mark.slow),
        pytest.param("torchvision:vit_b_32", 1, 64, marks=pytest.mark.slow),
        pytest.param("timm:resnet18", 1, 32, marks=TIMM),
        pytest.param("timm:vit_tiny_patch16_224", 1, 32, marks=TIMM),
        pytest.param("timm:efficientnet_b0", 1, 32, marks=TIMM),
    ],
)
def test_libraries_networks_for_any_number_of_channels_and_one_size_of_images(name, channels, size):
    with warnings.catch_warnings():
        warnings.simplefilter("default" if name.startswith("timm") else "error")
        network = make_model(name, 7, channels, size)
    logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_three_channels_are_torchvisions_own_network_in_training_mode():
    tried_on_an_image = make_model("torchvision:shufflenet_v2_x0_5", 2, 1, 32)
    assert all(module.training for module in tried_on_an_image.modules())
    torch.manual_seed(3)
    ours = make_model("resnet18", 7, 3, 32).state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=7).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_the_first_convolution_for_other_channels_has_responses_of_the_same_variance(channels):
    first = {count: make_model("resnet18", 7, count, 32).conv1 for count in (3, channels)}
    assert (first[channels].kernel_size, first[channels].stride, first[channels].padding) == ((7, 7), (2, 2), (3, 3))
    assert first[channels].bias is None
    spread = {count: layer(torch.randn(64, count, 32, 32)).std().item() for count, layer in first.items()}
    assert spread[channels] == pytest.approx(spread[3], rel=0.05)
    stem = make_model("torchvision:squeezenet1_1", 7, channels, 32).features[0]  # which has a bias
    assert (stem.weight.shape, stem.bias.shape) == ((64, channels, 3, 3), (64,))


def test_the_librarys_own_reason_is_given_for_images_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"'torchvision:maxvit_t' for 1×64×64 images does not work: .*divisible by"):
        make_model("torchvision:maxvit_t", 7, 1, 64)


@TIMM
def test_timm_names_are_checked():
    with pytest.raises(ValueError, match="unknown backbone 'timm:resnet51z'; the nearest is 'timm:resnet51q'"):
        make_model("timm:resnet51z", 7, 1, 32)
    # The names of weights on the hub, which would be looked up there.
    with pytest.raises(ValueError, match="unknown backbone 'timm:hf-hub:timm/resnet18'"):
        make_model("timm:hf-hub:timm/resnet18", 7, 1, 32)


class WithAuxiliaryLogits(nn.Module):
    def forward(self, images):
        return torch.zeros(1, 7), torch.zeros(1, 7)


@pytest.mark.parametrize("network", [nn.Flatten(), nn.ReLU(), WithAuxiliaryLogits()])
def test_a_network_without_one_row_of_logits_an_image_is_refused(monkeypatch, network):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *arguments, **options: network)
    with pytest.raises(ValueError, match="'torchvision:resnet34' for 3×32×32 images does not work"):
        make_model("torchvision:resnet34", 7, 3, 32)


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm:NAME need timm: pip install 'r2d2fast\[timm\]'"):
        make_model("timm:resnet18", 7, 1, 32)
