"""The registered operators: opcheck, torch.compile, the bank's version counter (rule 13)."""

import pytest
import torch

from r2d2fast import FusedD2Loss, d2_step
from r2d2fast._backends.common import STATISTICS
from tests.cases import DTYPES, make_bank


def operator_arguments(bank, logits, index, *, statistics=True, update=True):
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64) if statistics else None
    scalars = (0.1, 0.03, 50.0, 1.0, [None, None, torch.tensor(50.0), None])
    settings = ("kl_reverse", float(len(index)), float(len(index)), update)
    return (
        logits, index, bank.pseudo_logits, bank.slots, bank.step, bank.status, sums,
        bank.label_scale, bank.rounding, bank.seed, *scalars, *settings, "auto",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [True, False])
def test_opcheck_of_the_step(dtype, update):
    arguments = operator_arguments(make_bank(8, 20), torch.randn(5, 20).to(dtype), torch.arange(5), update=update)
    torch.library.opcheck(torch.ops.r2d2fast.d2_step.default, arguments)


def test_opcheck_of_the_step_without_statistics():
    arguments = operator_arguments(make_bank(8, 20), torch.randn(5, 20), torch.arange(5), statistics=False)
    torch.library.opcheck(torch.ops.r2d2fast.d2_step.default, arguments)


def test_opcheck_of_the_derivative():
    logits = torch.randn(5, 20, requires_grad=True)
    torch.library.opcheck(
        torch.ops.r2d2fast.attach_gradient.default, (logits, torch.tensor(1.5), torch.randn(5, 20), 1.0, torch.tensor(2.0))
    )


def training_step(criterion, network, x, index):
    loss = criterion(network(x), index)
    return loss * 2.0


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_step_is_the_eager_one(compiler):
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        bank = make_bank(40, 30)
        network = torch.nn.Linear(6, 30)
        criterion = FusedD2Loss(bank, label_lr=200.0, statistics=True)
        step = torch.compile(training_step, fullgraph=True, backend=compiler) if compiled else training_step
        losses = []
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            index = torch.randint(0, 40, (12,), generator=generator)
            network.zero_grad()
            loss = step(criterion, network, torch.randn(12, 6, generator=generator), index)
            loss.backward()
            losses.append(loss.item())
        outcomes.append((losses, network.weight.grad, bank.pseudo_logits, criterion.read_statistics(), int(bank.step)))
    (eager_losses, eager_grad, eager_bank, eager_statistics, _), (losses, grad, rows, statistics, steps) = outcomes
    assert losses == pytest.approx(eager_losses, rel=1e-6)
    torch.testing.assert_close(grad, eager_grad)
    torch.testing.assert_close(rows, eager_bank)
    assert statistics == pytest.approx(eager_statistics, rel=1e-6)
    assert steps == 4


def test_a_compiled_step_takes_any_batch_size_without_recompiling():
    torch._dynamo.reset()
    bank = make_bank(40, 30)
    criterion = FusedD2Loss(bank)
    network = torch.nn.Linear(6, 30)
    step = torch.compile(training_step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (12, 7, 33):
            before = bank.pseudo_logits.clone()
            step(criterion, network, torch.randn(size, 6), torch.arange(size)).backward()
            assert not torch.equal(bank.pseudo_logits, before)


def test_the_function_compiles_too():
    torch._dynamo.reset()
    logits, index = torch.randn(12, 30), torch.arange(12)
    banks = make_bank(40, 30), make_bank(40, 30)
    step = torch.compile(d2_step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(step(logits, index, banks[0]), d2_step(logits, index, banks[1]), strict=True):
        torch.testing.assert_close(ours, expected)
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)


def test_compiled_evaluation_leaves_the_bank_alone():
    torch._dynamo.reset()
    bank = make_bank(40, 30)
    before = bank.pseudo_logits.clone()
    criterion = FusedD2Loss(bank).eval()
    step = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        step(criterion, torch.nn.Linear(6, 30), torch.randn(12, 6), torch.arange(12))
    assert torch.equal(bank.pseudo_logits, before)


def test_the_bank_s_version_counter_moves():
    """So that autograd notices where a graph still needs the rows from before."""
    bank = make_bank(8, 20)
    versions = [bank.pseudo_logits._version]
    d2_step(torch.randn(8, 20), torch.arange(8), bank)
    versions.append(bank.pseudo_logits._version)
    bank.predict_(torch.arange(8), torch.randn(8, 20))
    versions.append(bank.pseudo_logits._version)
    d2_step(torch.randn(8, 20), torch.arange(8), bank, update=False)
    assert versions[0] < versions[1] < versions[2] == bank.pseudo_logits._version
