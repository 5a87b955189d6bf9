"""PyTorch citizen, on a device: opcheck, torch.compile, autocast, GradScaler."""

import pytest
import torch

from r2d2fast import FusedD2Loss, d2_step
from r2d2fast.bank import DTYPES
from r2d2fast.testing import make_bank
from tests.test_operators import operator_arguments, training_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [True, False])
def test_opcheck(backend, device, dtype, update):
    logits, index = torch.randn(5, 20, device=device).to(dtype), torch.arange(5, device=device)
    arguments = operator_arguments(make_bank(8, 20, device=device), logits, index, update=update, backend=backend)
    torch.library.opcheck(torch.ops.r2d2fast.d2_step.default, arguments)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_step_is_the_eager_one(backend, device, mode, dynamic):
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        bank = make_bank(40, 30, device=device)
        network = torch.nn.Linear(6, 30, device=device)
        alpha = torch.tensor(0.1, device=device)
        criterion = FusedD2Loss(bank, alpha, label_lr=200.0, statistics=True, backend=backend)
        step = training_step
        if compiled:
            step = torch.compile(training_step, fullgraph=True, dynamic=dynamic, mode=mode)
        losses = []
        for number, size in enumerate((12, 12, 12, 20, 28)):
            generator = torch.Generator().manual_seed(number)
            index = torch.randint(0, 40, (size,), generator=generator).to(device)
            x = torch.randn(size, 6, generator=generator).to(device)
            alpha.fill_(0.1 + 0.1 * number)
            network.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=size == 28):
                loss = step(criterion, network, x, index)
            loss.backward()
            losses.append(loss.item())
        outcomes.append((losses, network.weight.grad, bank.pseudo_logits, criterion.read_statistics(), bank.updates))
    (eager_losses, *eager), (losses, *rest) = outcomes
    assert losses == pytest.approx(eager_losses, rel=1e-4)
    for ours, expected in zip(rest, eager, strict=True):
        if isinstance(ours, dict):
            assert ours == pytest.approx(expected, rel=1e-4)
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_version_counter_moves(backend, device):
    bank = make_bank(8, 20, device=device)
    before = bank.pseudo_logits._version
    d2_step(torch.randn(8, 20, device=device), torch.arange(8, device=device), bank, backend=backend)
    assert bank.pseudo_logits._version > before


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_hands_on_16_bit_logits(backend, device, dtype):
    network = torch.nn.Linear(6, 30, device=device)
    x, index = torch.randn(12, 6, device=device), torch.arange(12, device=device)
    seen = []
    banks = make_bank(40, 30, device=device), make_bank(40, 30, device=device)
    with torch.autocast("cuda", dtype=dtype):
        logits = network(x)
        logits.register_hook(seen.append)
        loss = FusedD2Loss(banks[0], backend=backend)(logits, index)
    loss.backward()
    expected = d2_step(logits.detach(), index, banks[1], backend=backend)
    assert logits.dtype == seen[0].dtype == dtype
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected[0])
    assert torch.equal(seen[0], expected[1])
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)


def test_a_grad_scaler_gives_its_scale_as_a_tensor(backend, device):
    """The gradient takes the scale before it is rounded to float16, and nobody waits to learn what the scale is."""
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 300, device=device)
    x, index = torch.randn(12, 6, device=device), torch.arange(12, device=device)
    bank, exact = (make_bank(40, 300, device=device) for _ in range(2))
    criterion = FusedD2Loss(bank, normalizer=2.0**14, update_normalizer=12.0, backend=backend)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    scaler.scale(torch.zeros((), device=device))  # makes the tensor
    with torch.autocast("cuda", dtype=torch.float16):
        logits = network(x)
        assert logits.dtype == torch.float16
        loss = criterion(logits, index, grad_scale=scaler._scale)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    plain = FusedD2Loss(exact, normalizer=2.0**14, update_normalizer=12.0, backend="reference")(network(x), index)
    expected = torch.autograd.grad(plain, network.weight)[0]
    torch.testing.assert_close(network.weight.grad, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14  # no inf was found
    bank.check()
