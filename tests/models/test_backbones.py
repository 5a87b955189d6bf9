import logging
import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn

from r2d2fast.models import BACKBONES, export_safetensors, make_model
from r2d2fast.models.batch_norm import GroupedBatchNorm2d
from r2d2fast.models.conv_large import InputNoise

SIZES = {"small": 8, "lenet2d": 28, "convlarge": 32, "shake26-96": 32, "resnet18": 64}
EMBEDDINGS = ["linear", "mlp"]  # test_heads.py


@pytest.fixture(scope="module")
def networks():
    """Every backbone with a name of its own, for 3 channels and 10 classes."""
    torch.manual_seed(0)
    return {name: make_model(name, 10, 3, size) for name, size in SIZES.items()}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


def test_every_backbone_is_tested():
    assert list(BACKBONES) == [*SIZES, *EMBEDDINGS]


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "count"),
    [
        ("small", 10, 1, 8, 24_058),
        ("lenet2d", 10, 1, 28, 61_056),
        ("convlarge", 10, 3, 32, 3_121_802),
        ("convlarge", 100, 3, 32, 3_133_412),
        ("shake26-96", 10, 3, 32, 26_193_466),
        # torchvision's own figure, of its table of weights.
        ("resnet18", 1000, 3, 224, 11_689_512),
        ("torchvision:resnet50", 1000, 3, 64, 25_557_032),
    ],
)
def test_numbers_of_parameters(name, classes, channels, size, count):
    network = make_model(name, classes, channels, size)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_logits_of_a_batch_and_gradients_for_every_parameter(networks, name):
    network = networks[name].train()
    logits = network(torch.randn(4, 3, SIZES[name], SIZES[name]))
    assert logits.shape == (4, 10)
    network.zero_grad()
    logits.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_channels_last_gives_the_same_logits(networks, name):
    network = networks[name].eval()
    images = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.no_grad():
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        result = network(images.contiguous(memory_format=torch.channels_last))
        network.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_weights_and_the_state_dict_carries_them(networks, name):
    def made(seed):
        torch.manual_seed(seed)
        return make_model(name, 10, 3, SIZES[name])

    first, second, other = made(7), made(7), made(8)
    states = [network.state_dict() for network in (first, second, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    images = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.no_grad():
        expected = first.eval()(images)
        assert not torch.equal(other.eval()(images), expected)
        other.load_state_dict(states[0])
        assert torch.equal(other(images), expected)


def test_a_new_network_is_in_training_mode(name):
    assert all(module.training for module in make_model(name, 2, 1, SIZES[name]).modules())


def test_so_is_one_that_was_tried_on_an_image():
    assert all(module.training for module in make_model("torchvision:shufflenet_v2_x0_5", 2, 1, 32).modules())


@pytest.mark.parametrize("size", [4, 32])
def test_the_small_network_takes_larger_images(size):
    assert make_model("small", 10, 3, size)(torch.randn(2, 3, size, size)).shape == (2, 10)


SMALLEST_AND_ODD = [
    ("lenet2d", 4),
    ("lenet2d", 11),
    ("lenet2d", 12),
    ("lenet2d", 33),
    ("convlarge", 12),
    ("shake26-96", 4),
]


@pytest.mark.parametrize(("name", "size"), SMALLEST_AND_ODD)
def test_the_smallest_and_odd_sizes_work(name, size):
    assert make_model(name, 10, 3, size)(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "size", "needed"),
    [
        ("small", 3, "at least 4"),
        ("lenet2d", 3, "at least 4"),
        ("convlarge", 8, "at least 12"),
        ("shake26-96", 30, "at least 4, a multiple of 4"),
        ("resnet18", -1, "at least 1"),
    ],
)
def test_sizes_that_a_backbone_does_not_take_are_refused(name, size, needed):
    with pytest.raises(ValueError, match=rf"'{name}' does not take images of {size}×{size} pixels; needed: {needed}$"):
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
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_the_accepted_ones(name, nearest):
    accepted = "accepted: small, lenet2d, convlarge, shake26-96, resnet18, linear, mlp, torchvision:NAME, timm:NAME"
    with pytest.raises(ValueError, match=f"unknown backbone '{name}'; the nearest is {nearest}.*; {accepted}"):
        make_model(name, 10, 3, 32)


def test_where_no_name_is_near_none_is_suggested():
    with pytest.raises(ValueError, match="unknown backbone 'xyzzyx'; accepted: small"):
        make_model("xyzzyx", 10, 3, 32)


def test_switches_of_convlarge():
    network = make_model("convlarge", 10, 3, 32, input_noise=True, weight_norm=True)
    assert isinstance(network[0], InputNoise)
    assert hasattr(network[1], "parametrizations")
    assert not any(isinstance(layer, InputNoise) for layer in make_model("convlarge", 10, 3, 32, weight_norm=True))


@pytest.mark.parametrize("name", ["small", "torchvision:resnet18"])
@pytest.mark.parametrize("switch", ["input_noise", "weight_norm"])
def test_a_switch_that_a_backbone_does_not_have_is_refused(name, switch):
    with pytest.raises(ValueError, match=f"'{name}' has no switch {switch}; only convlarge has it"):
        make_model(name, 10, 3, 32, **{switch: True})


def test_bn_groups(name):
    if name == "lenet2d":
        with pytest.raises(ValueError, match=r"bn_groups is 4, but the network has no nn\.BatchNorm2d"):
            make_model(name, 10, 3, 32, bn_groups=4)
        return
    network = make_model(name, 10, 3, 32, bn_groups=4)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {(type(norm), norm.groups) for norm in norms} == {(GroupedBatchNorm2d, 4)}


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


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("resnet18", 1, 32),
        ("torchvision:mobilenet_v3_small", 1, 32),
        ("torchvision:densenet121", 4, 32),
        ("torchvision:googlenet", 3, 64),
        ("torchvision:vit_b_32", 1, 64),
    ],
)
def test_torchvision_for_any_number_of_channels_and_one_size_of_images(name, channels, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = make_model(name, 7, channels, size)
    logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_three_channels_are_torchvisions_own_network():
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


def test_the_first_convolution_for_other_channels_keeps_its_bias():
    stem = make_model("torchvision:squeezenet1_1", 7, 1, 32).features[0]
    assert stem.weight.shape == (64, 1, 3, 3)
    assert stem.bias.shape == (64,)


def test_the_librarys_own_reason_is_given_for_images_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"'torchvision:maxvit_t' for 1×64×64 images does not work: .*divisible by"):
        make_model("torchvision:maxvit_t", 7, 1, 64)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("vit_tiny_patch16_224", 32), ("efficientnet_b0", 32)])
def test_timm_for_any_number_of_channels_and_one_size_of_images(name, size):
    pytest.importorskip("timm")
    network = make_model(f"timm:{name}", 7, 1, size)
    logits = network(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()


def test_timm_names_are_checked():
    pytest.importorskip("timm")
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
