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


def assert_like_data_parallel(network, images, sizes, groups):
    """Against the definition of DataParallel: a copy of the network for each part, gradients added up, first copy's buffers."""
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


@pytest.mark.parametrize(("groups", "size"), [(2, 8), (4, 4), (4, 6), (3, 2)])
def test_groups_are_normalised_as_by_data_parallel_and_the_first_alone_enters_the_running_statistics(
    network, groups, size
):
    sizes = [size] * groups
    assert_like_data_parallel(network, unlike_parts(sizes), sizes, groups)


@pytest.mark.parametrize(
    ("groups", "sizes"), [(4, [3, 3, 2, 2]), (4, [3, 2, 2, 2]), (4, [3, 2, 2]), (4, [2, 2]), (4, [3]), (4, [1])]
)
def test_an_odd_batch_has_parts_of_nearly_one_size_and_of_two_samples_at_least(network, groups, sizes):
    assert_like_data_parallel(network, unlike_parts(sizes), sizes, groups)


def test_the_groups_are_really_apart(network):
    images = unlike_parts([4, 4])
    plain = copy.deepcopy(network)(images)
    assert (with_bn_groups(network, 2)(images) - plain).abs().max() > 0.1


def test_eval_mode_is_plain_batch_norm(network):
    images = unlike_parts([4, 4])
    plain = copy.deepcopy(network).eval()
    assert torch.equal(with_bn_groups(network, 2).eval()(images), plain(images))


def test_the_mode_stays_what_it_was(network):
    assert not any(module.training for module in with_bn_groups(network.eval(), 2).modules())


def test_parameters_buffers_and_keys_are_the_same_ones(network):
    before = dict(network.named_parameters()) | dict(network.named_buffers())
    keys = list(network.state_dict())
    grouped = with_bn_groups(network, 4)
    after = dict(grouped.named_parameters()) | dict(grouped.named_buffers())
    assert list(grouped.state_dict()) == keys
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert sum(isinstance(module, GroupedBatchNorm2d) for module in grouped.modules()) == 3


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


def test_a_layer_in_two_places_is_replaced_in_both():
    norm = nn.BatchNorm2d(3)
    grouped = with_bn_groups(nn.Sequential(norm, nn.Sequential(norm)), 2)
    assert [type(grouped[0]), type(grouped[1][0])] == [GroupedBatchNorm2d] * 2
    assert grouped[0].weight is grouped[1][0].weight


def test_one_group_leaves_the_network_alone(network):
    assert with_bn_groups(network, 1) is network
    assert not any(isinstance(module, GroupedBatchNorm2d) for module in network.modules())


def test_channels_last_stays_channels_last():
    grouped = with_bn_groups(nn.Sequential(nn.BatchNorm2d(3)), 2)
    images = torch.randn(8, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    output = grouped(images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, grouped(images.contiguous()))


def test_torch_compile_with_batches_of_several_sizes():
    norm = nn.BatchNorm2d(3)
    grouped = with_bn_groups(nn.Sequential(norm), 4)
    compiled = torch.compile(copy.deepcopy(grouped), fullgraph=True, backend="aot_eager")
    for size in (8, 10, 5):
        images = torch.randn(size, 3, 4, 4)
        torch.testing.assert_close(compiled(images), grouped(images))
    torch.testing.assert_close(compiled.state_dict()["_orig_mod.0.running_mean"], norm.running_mean)


def test_copied_and_pickled_it_stays_grouped(network):
    images = unlike_parts([4, 4])
    grouped = with_bn_groups(network, 2)
    for again in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        torch.testing.assert_close(again(images), copy.deepcopy(grouped)(images))


@pytest.mark.parametrize("groups", [0, -4])
def test_fewer_than_one_group_is_refused(network, groups):
    with pytest.raises(ValueError, match=f"bn_groups is {groups}; it must be at least 1"):
        with_bn_groups(network, groups)


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match=r"bn_groups is 4, but the network has no nn\.BatchNorm2d; only 1"):
        with_bn_groups(nn.Sequential(nn.Linear(2, 2)), 4)


class Other(nn.BatchNorm2d):
    pass


def test_an_unknown_kind_is_refused_before_anything_is_replaced():
    network = nn.Sequential(nn.BatchNorm2d(2), Other(2))
    with pytest.raises(ValueError, match=r"bn_groups is 4, but 1 is a Other.*take bn_groups 1"):
        with_bn_groups(network, 4)
    assert type(network[0]) is nn.BatchNorm2d


@pytest.mark.extra("timm")
def test_timms_norm_keeps_its_activation():
    from timm import layers

    norm = layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    images = torch.randn(8, 3, 4, 4)
    expected = torch.cat([copy.deepcopy(norm)(part) for part in images.split(4)])
    torch.testing.assert_close(with_bn_groups(nn.Sequential(norm), 2)(images), expected)
