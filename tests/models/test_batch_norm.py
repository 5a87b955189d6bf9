import copy
import pickle

import pytest
import torch
from torch import nn

from r2d2fast.models import small_convnet, with_bn_groups
from r2d2fast.models.batch_norm import GroupedBatchNorm2d


@pytest.fixture
def network():
    """A small network whose batch norms are not at their initial values."""
    network = small_convnet(channels=2, num_classes=3)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    network(torch.randn(16, 2, 8, 8))
    return network


def unlike_parts(sizes):
    """Images whose parts differ in mean and spread."""
    return torch.cat([torch.randn(size, 2, 8, 8) * (part + 1) + part for part, size in enumerate(sizes)])


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        *((2, [8, 8]), (4, [4] * 4), (4, [6] * 4), (3, [2] * 3)),
        # An odd batch has parts of nearly one size, and of two samples at least.
        *((4, [3, 3, 2, 2]), (4, [3, 2, 2, 2]), (4, [3, 2, 2]), (4, [2, 2]), (4, [3]), (4, [1])),
    ],
)
def test_groups_are_normalised_as_by_data_parallel_and_the_first_alone_enters_the_running_statistics(
    network, groups, sizes
):
    """Against the definition of DataParallel: a copy of the network for each part, gradients added up, first copy's buffers."""
    images = unlike_parts(sizes)
    plain = copy.deepcopy(network)
    replicas = [copy.deepcopy(network) for _ in sizes]
    expected = torch.cat([replica(part) for replica, part in zip(replicas, images.split(sizes), strict=True)])
    expected.square().sum().backward()
    grouped = with_bn_groups(network, groups)
    logits = grouped(images)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for parameter, *parts in zip(*(model.parameters() for model in (grouped, *replicas)), strict=True):
        torch.testing.assert_close(parameter.grad, sum(part.grad for part in parts))
    torch.testing.assert_close(dict(grouped.named_buffers()), dict(replicas[0].named_buffers()))
    assert len(sizes) == 1 or (logits - plain(images)).abs().max() > 0.1
    assert torch.equal(grouped.eval()(images), replicas[0].eval()(images))  # in eval mode it is plain batch norm


def test_parameters_buffers_keys_and_the_mode_are_the_same_ones(network):
    before = dict(network.named_parameters()) | dict(network.named_buffers())
    keys = list(network.state_dict())
    assert with_bn_groups(network, 1) is network
    assert not any(isinstance(module, GroupedBatchNorm2d) for module in network.modules())
    grouped = with_bn_groups(network.eval(), 4)
    after = dict(grouped.named_parameters()) | dict(grouped.named_buffers())
    assert list(grouped.state_dict()) == keys
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert sum(isinstance(module, GroupedBatchNorm2d) for module in grouped.modules()) == 3
    assert not any(module.training for module in grouped.modules())


def test_settings_are_taken_over():
    norm = nn.BatchNorm2d(3, eps=0.1, momentum=0.5, affine=False)
    images = torch.randn(8, 3, 4, 4) + 5
    grouped = with_bn_groups(nn.Sequential(norm), 2)
    assert "groups=2" in repr(grouped)
    first, second = images.split(4)

    def normalised(part):
        return (part - part.mean((0, 2, 3), keepdim=True)) / (part.var((0, 2, 3), False, keepdim=True) + 0.1).sqrt()

    torch.testing.assert_close(grouped(images), torch.cat([normalised(first), normalised(second)]))
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)) / 2)


def test_a_cumulative_average_counts_batches_not_groups():
    norm = nn.BatchNorm2d(3, momentum=None)
    grouped = with_bn_groups(nn.Sequential(norm), 2)
    batches = torch.randn(2, 8, 3, 4, 4) + 5
    for batch in batches:
        grouped(batch)
    torch.testing.assert_close(norm.running_mean, batches[:, :4].mean((0, 1, 3, 4)))
    assert norm.num_batches_tracked == 2
    twice = with_bn_groups(nn.Sequential(norm, nn.Sequential(norm)), 2)  # a layer in two places is replaced in both
    assert [type(twice[0]), type(twice[1][0])] == [GroupedBatchNorm2d] * 2
    assert twice[0].weight is twice[1][0].weight


def test_channels_last_copies_pickles_and_torch_compile_keep_it(network):
    images = unlike_parts([4, 4])
    grouped = with_bn_groups(network, 2)
    for again in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        torch.testing.assert_close(again(images), copy.deepcopy(grouped)(images))
    grouped = with_bn_groups(nn.Sequential(nn.BatchNorm2d(2)), 4)
    output = grouped(images.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, grouped(images))
    compiled = torch.compile(copy.deepcopy(grouped), fullgraph=True, backend="aot_eager")
    for size in (8, 10, 5):
        images = torch.randn(size, 2, 4, 4)
        torch.testing.assert_close(compiled(images), grouped(images))
    torch.testing.assert_close(compiled.state_dict()["_orig_mod.0.running_mean"], grouped[0].running_mean)


class Other(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [
        ([nn.BatchNorm2d(2)], 0, "bn_groups is 0; it must be at least 1"),
        ([nn.BatchNorm2d(2)], -4, "bn_groups is -4; it must be at least 1"),
        ([nn.Linear(2, 2)], 4, r"bn_groups is 4, but the network has no nn\.BatchNorm2d; only 1"),
        ([nn.BatchNorm2d(2), Other(2)], 4, r"bn_groups is 4, but 1 is a Other.*take bn_groups 1"),
    ],
)
def test_what_cannot_be_grouped_is_refused_before_anything_is_replaced(layers, groups, message):
    network = nn.Sequential(*layers)
    with pytest.raises(ValueError, match=message):
        with_bn_groups(network, groups)
    assert type(network[0]) is type(layers[0])


@pytest.mark.extra("timm")
def test_timms_norm_keeps_its_activation():
    from timm import layers

    norm = layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    images = torch.randn(8, 3, 4, 4)
    expected = torch.cat([copy.deepcopy(norm)(part) for part in images.split(4)])
    torch.testing.assert_close(with_bn_groups(nn.Sequential(norm), 2)(images), expected)
