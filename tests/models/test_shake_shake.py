import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from scipy.stats import kstest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from r2d2fast.models.shake_shake import Block, Shake, ShakeShake, ShiftedSkip


def batch_norm(x, layer):
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def branch_by_hand(x, branch, stride):
    first, first_norm, _, second, second_norm = branch
    x = batch_norm(F.conv2d(F.relu(x), first.weight, stride=stride, padding=1), first_norm)
    return batch_norm(F.conv2d(F.relu(x), second.weight, padding=1), second_norm)


def logits_by_hand(network, images):
    """The network as its docstring describes it, layer by layer, in eval mode."""
    x = F.conv2d(images, network.stem.weight, padding=1)
    for number, stage in enumerate(network.stages):
        for place, block in enumerate(stage):
            stride = 2 if number and not place else 1
            if number and not place:
                grids = F.relu(torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], dim=1))
                convolution = block.skip.convolution
                skip = batch_norm(F.conv2d(grids, convolution.weight, convolution.bias, groups=2), block.skip.norm)
            elif not place:
                skip = batch_norm(F.conv2d(x, block.skip[0].weight), block.skip[1])
            else:
                skip = x
            x = skip + (branch_by_hand(x, block.left, stride) + branch_by_hand(x, block.right, stride)) / 2
    return network.linear(F.avg_pool2d(x, 8).flatten(1))


@pytest.fixture
def network():
    """Shake-Shake of width 4, with the running statistics of a few training batches."""
    network = ShakeShake(num_classes=5, in_channels=3, width=4)
    for _ in range(3):
        network(2 * torch.randn(8, 3, 32, 32) + 1)
    return network


def test_in_eval_mode_it_is_the_network_described(network):
    shapes = []
    for stage in network.stages:
        for block in stage:
            block.register_forward_hook(lambda block, inputs, output: shapes.append(tuple(output.shape[1:])))
    images = torch.randn(4, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images), logits_by_hand(network, images))
        assert shapes == [(4, 32, 32)] * 4 + [(8, 16, 16)] * 4 + [(16, 8, 8)] * 4
        assert network(torch.randn(2, 3, 28, 20)).shape == (2, 5)  # averaged over all places


class Given(nn.Module):
    """A branch that returns what it is given instead of computing it."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor

    def forward(self, x):
        return self.tensor


@pytest.mark.parametrize("compiled", [False, True])
def test_gates_of_each_sample_are_uniform_fresh_and_independent_of_each_other(compiled):
    """Forward gates in the output and backward gates in the gradients, of branches that are 1 and 0."""
    torch.manual_seed(0)
    left, right = (torch.full((2000, 2, 3, 3), value, requires_grad=True) for value in (1.0, 0.0))
    block = Block(2, 2, halve=False)
    block.left, block.right = Given(left), Given(right)
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    output = run(torch.zeros(2000, 2, 3, 3))
    output.sum().backward()
    for gate in (output.detach(), left.grad):
        assert torch.equal(gate, gate[:, :1, :1, :1].expand_as(gate))
        assert len(gate[:, 0, 0, 0].unique()) > 1990
        assert kstest(gate[:, 0, 0, 0].numpy(), "uniform").pvalue > 0.01
    # Three standard deviations of the correlation of 2000 independent pairs.
    pairs = torch.stack([output.detach()[:, 0, 0, 0], left.grad[:, 0, 0, 0]])
    assert torch.corrcoef(pairs)[0, 1].abs() < 3 / 2000**0.5
    torch.testing.assert_close(left.grad + right.grad, torch.ones_like(left))  # the branches share the whole gradient
    assert not torch.equal(run(torch.zeros(2000, 2, 3, 3)), output)


def test_equal_gates_make_it_an_ordinary_mixture():
    left, right = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).requires_grad_()
    gate = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: Shake.apply(a, b, gate, gate), (left, right))


def test_eval_mode_draws_nothing_and_takes_the_mean():
    block = Block(2, 2, halve=False).eval()
    left, right, x = torch.randn(3, 4, 2, 8, 8)
    block.left, block.right = Given(left), Given(right)
    state = torch.get_rng_state()
    torch.testing.assert_close(block(x), x + (left + right) / 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_shifted_skip_sees_two_grids_of_pixels_each_with_its_own_half_of_the_outputs():
    skip = ShiftedSkip(2, 6).eval()
    x = torch.randn(3, 2, 4, 6)
    result = skip(x)
    assert result.shape == (3, 6, 2, 3)
    weight = skip.convolution.weight[:, :, 0, 0]
    for row in range(2):
        for column in range(3):
            for half, shift in ((slice(0, 3), 0), (slice(3, 6), 1)):
                pixel = x[:, :, 2 * row + shift, 2 * column + shift].relu()
                expected = (pixel @ weight[half].T + skip.convolution.bias[half]) / (1 + skip.norm.eps) ** 0.5
                torch.testing.assert_close(result[:, half, row, column], expected)


def test_autocast(network):
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(4, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in network.parameters())


def test_distributed_data_parallel_gives_the_same_gradients(network, tmp_path):
    images = torch.randn(4, 3, 32, 32)

    def gradients(model):
        network.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    alone = gradients(network)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        together = gradients(DistributedDataParallel(network))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(together, alone)
