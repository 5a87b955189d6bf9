"""The registered operators: opcheck, torch.compile, the bank's version counter (PyTorch citizen)."""

import math
import re

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError
from torch._inductor.utils import run_and_get_code

from r2d2fast import BackendError, FusedD2Loss, d2_loss, d2_step
from r2d2fast._backends import NAMES, choose
from r2d2fast._backends.common import STATISTICS
from r2d2fast.bank import DTYPES
from r2d2fast.testing import make_bank


def takes_cpu_tensors(name):
    try:
        return bool(choose(name, torch.zeros(1, 2), torch.zeros(1, 2)))
    except BackendError:
        return False


CPU_SIDE = [name for name in NAMES if takes_cpu_tensors(name)]
if "triton" in CPU_SIDE:
    from tests.kernels.interpreter import patch_interpreter

    patch_interpreter()
COMPILERS = pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()


def operator_arguments(bank, logits, index, *, statistics=True, update=True, reduction="mean", backend="auto"):
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=logits.device) if statistics else None
    scalars = ([0.1, 0.03, 1.0, 1.0], [None, None, torch.tensor(50.0, device=logits.device), None])
    settings = ("kl_reverse", None, float(len(index)), update, reduction, 1)
    return (
        logits, index, bank.pseudo_logits, bank.slots, bank.updates, bank.status, sums,
        bank.label_scale, bank.rounding, bank.seed, *scalars, *settings, backend,
    )  # fmt: skip


@pytest.mark.parametrize("name", CPU_SIDE)
class TestOpcheck:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("update", [True, False])
    def test_of_the_step(self, name, dtype, update):
        logits, index = torch.randn(5, 20).to(dtype), torch.arange(5)
        arguments = operator_arguments(make_bank(8, 20), logits, index, update=update, backend=name)
        torch.library.opcheck(torch.ops.r2d2fast.d2_step.default, arguments)

    @pytest.mark.parametrize("overwritten", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_of_the_step_into_a_tensor(self, name, overwritten, reduction):
        logits = torch.randn(5, 20)
        arguments = operator_arguments(make_bank(8, 20), logits, torch.arange(5), reduction=reduction, backend=name)
        out = logits if overwritten else torch.empty_like(logits)
        torch.library.opcheck(torch.ops.r2d2fast.d2_step_out.default, (*arguments, out))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_of_the_step_on_views_without_statistics(self, name, reduction):
        logits, index = torch.randn(5, 23)[:, 1:21], torch.arange(10, dtype=torch.int32)[::2]
        bank = make_bank(12, 20, dtype=torch.bfloat16, rounding="stochastic")
        arguments = operator_arguments(bank, logits, index, statistics=False, reduction=reduction, backend=name)
        torch.library.opcheck(torch.ops.r2d2fast.d2_step.default, arguments)


@pytest.mark.parametrize("loss", [torch.tensor(1.5), torch.arange(5.0)])
@pytest.mark.parametrize("grad_scale", [None, torch.tensor(2.0)])
def test_opcheck_of_the_derivative(grad_scale, loss):
    logits = torch.randn(5, 20, requires_grad=True)
    arguments = (logits, loss, torch.randn(5, 20), 4.0, grad_scale)
    torch.library.opcheck(torch.ops.r2d2fast.attach_gradient.default, arguments)


def test_what_is_written_is_declared():
    written = {
        operator: {argument.name for argument in operator.default._schema.arguments if argument.is_write}
        for operator in (
            torch.ops.r2d2fast.d2_step,
            torch.ops.r2d2fast.d2_step_out,
            torch.ops.r2d2fast.attach_gradient,
        )
    }
    bank = {"pseudo_logits", "updates", "status", "statistics"}
    assert list(written.values()) == [bank, bank | {"out"}, set()]


def training_step(criterion, network, x, index, weight=None):
    loss = criterion(network(x), index, sample_weight=weight)
    return loss * 2.0


class TestCompiledTraining:
    @pytest.mark.parametrize(("name", "compiler"), [*((name, "aot_eager") for name in CPU_SIDE), ("auto", "inductor")])
    def test_is_the_eager_one(self, name, compiler):
        self.compare(name, compiler)

    def test_is_the_eager_one_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            self.compare("auto", "aot_eager")

    def compare(self, name, compiler):
        outcomes = []
        for compiled in (False, True):
            torch.manual_seed(0)
            bank = make_bank(40, 30)
            network = torch.nn.Linear(6, 30)
            criterion = FusedD2Loss(bank, label_lr=200.0, statistics=True, backend=name)
            step = torch.compile(training_step, fullgraph=True, backend=compiler) if compiled else training_step
            losses = []
            for number in range(4):
                generator = torch.Generator().manual_seed(number)
                index = torch.randint(0, 40, (12,), generator=generator)
                network.zero_grad()
                loss = step(criterion, network, torch.randn(12, 6, generator=generator), index)
                loss.backward()
                losses.append(loss.item())
            outcomes.append(
                (losses, network.weight.grad, bank.pseudo_logits, criterion.read_statistics(), int(bank.updates))
            )
        (eager_losses, eager_grad, eager_bank, eager_statistics, _), (losses, grad, rows, statistics, steps) = outcomes
        assert losses == pytest.approx(eager_losses, rel=1e-6)
        torch.testing.assert_close(grad, eager_grad)
        torch.testing.assert_close(rows, eager_bank)
        assert statistics == pytest.approx(eager_statistics, rel=1e-6)
        assert steps == 4

    def test_evaluation_leaves_the_bank_alone(self):
        bank = make_bank(40, 30)
        before = bank.pseudo_logits.clone()
        criterion = FusedD2Loss(bank).eval()
        step = torch.compile(training_step, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            step(criterion, torch.nn.Linear(6, 30), torch.randn(12, 6), torch.arange(12))
        assert torch.equal(bank.pseudo_logits, before)

    def test_copies_no_bank(self):
        """Inductor runs the operator in place: what it allocates is of the batch's size, not of the bank's."""
        bank = make_bank(40, 30)
        step = torch.compile(FusedD2Loss(bank), fullgraph=True)
        _, sources = run_and_get_code(step, torch.randn(12, 30, requires_grad=True), torch.arange(12))
        shape = ", ".join(map(str, bank.pseudo_logits.shape))
        assert any(f"({shape})" in source for source in sources)
        assert not any(re.search(rf"empty_strided\w*\(\({shape}\)", source) for source in sources)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weighted_rows_compile(reduction):
    weight, index = torch.rand(12), torch.arange(12)
    outcomes = []
    for compiled in (False, True):
        bank, logits = make_bank(40, 30), torch.linspace(-3, 3, 360).view(12, 30).requires_grad_()
        criterion = FusedD2Loss(bank, label_lr=200.0, reduction=reduction, gradient_accumulation_steps=2)
        call = torch.compile(criterion, fullgraph=True, backend="aot_eager") if compiled else criterion
        loss = call(logits, index, sample_weight=weight)
        (loss * torch.arange(1.0, 13.0)).sum().backward()
        outcomes.append((loss, logits.grad, bank.pseudo_logits))
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("normalizer", [None, 512.0])
@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16)])
def test_weighted_rows_leave_a_scaled_float16_gradient_its_range_when_compiled(scale, normalizer):
    bank = make_bank(512, 3, labelled_every=0)
    bank.pseudo_logits.copy_(torch.tensor([70.0, 0.0, 0.0]))
    criterion = FusedD2Loss(bank, normalizer=normalizer).eval()
    grads = []
    for call in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        logits = torch.tensor([[0.0, 1.0, 0.0]]).repeat(512, 1).half().requires_grad_()
        loss = call(logits, torch.arange(512), grad_scale=scale, sample_weight=torch.ones(512))
        (loss * scale).backward()
        grads.append(logits.grad)
    assert grads[1].isfinite().all()
    torch.testing.assert_close(*grads)


def step_function(criterion, logits, index, **options):
    return d2_step(logits, index, criterion.bank, label_lr=200.0, **options)


def step_method(criterion, logits, index, **options):
    return criterion.step(logits, index, **options)


@COMPILERS
@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("step", [step_function, step_method])
def test_steps_without_autograd_compile_too(step, overwritten, compiler):
    logits, index = torch.randn(12, 30), torch.arange(12)
    outcomes = []
    for run in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        bank, given = make_bank(40, 30), logits.clone()
        criterion = FusedD2Loss(bank, label_lr=200.0, statistics=True, gradient_accumulation_steps=2)
        loss, grad = run(criterion, given, index, grad_scale=4.0, out=given if overwritten else None)
        assert overwritten == torch.equal(given, grad)
        outcomes.append((loss, grad, bank.pseudo_logits, bank.updates, criterion.statistics))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
    assert outcomes[0][-1].any() == (step is step_method)


class TestRecompiling:
    """What changes from step to step, and what that costs."""

    def test_never_for_the_value_of_a_tensor(self):
        schedule = [(0.1, 0.03, 200.0, 1.0), (0.2, 0.05, 100.0, 64.0), (0.3, 0.01, 50.0, 32.0)]
        step = torch.compile(lambda c, x, i, scale: c(x, i, grad_scale=scale), fullgraph=True, backend="aot_eager")
        banks = make_bank(40, 30), make_bank(40, 30)
        scheduled = FusedD2Loss(banks[0], *torch.tensor(schedule[0][:3]))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for number, (alpha, beta, label_lr, scale) in enumerate(schedule):
                logits = torch.randn(12, 30, requires_grad=True)
                # In place, or another tensor in its place.
                scheduled.alpha.fill_(alpha)
                scheduled.beta, scheduled.label_lr = torch.tensor(beta), torch.tensor(label_lr)
                loss = step(scheduled, logits, torch.arange(12), torch.tensor(scale))
                (grad,) = torch.autograd.grad(loss, logits)
                plain = FusedD2Loss(banks[1], alpha, beta, label_lr)(logits, torch.arange(12))
                torch.testing.assert_close(loss, plain, msg=f"loss of step {number}")
                torch.testing.assert_close(grad, *torch.autograd.grad(plain, logits))
                assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_for_each_new_value_of_a_python_number(self, dynamic):
        """TorchDynamo makes a constant of a number that an operator takes; under fullgraph, 8 values are its limit."""
        criterion = FusedD2Loss(make_bank(40, 30))
        step = torch.compile(lambda x, i: criterion(x, i), fullgraph=True, dynamic=dynamic, backend="aot_eager")

        def run(alpha):
            criterion.alpha = alpha
            step(torch.randn(12, 30), torch.arange(12))

        for alpha in (0.1, 0.2, 0.3):
            run(alpha)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(0.2)
            run(0.1)
            with pytest.raises(RecompileError, match="alpha"):
                run(0.4)
        with torch._dynamo.config.patch(recompile_limit=3), pytest.raises(FailOnRecompileLimitHit):
            run(0.4)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(("dynamic", "compiling"), [(True, 1), (None, 2)])
    def test_once_at_most_for_batch_sizes(self, dynamic, compiling, weighted):
        bank = make_bank(40, 30)
        criterion, network = FusedD2Loss(bank), torch.nn.Linear(6, 30)
        step = torch.compile(training_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for number, size in enumerate((12, 7, 33, 12, 40)):
            before = bank.pseudo_logits.clone()
            weight = torch.rand(size) if weighted else None
            with torch._dynamo.config.patch(error_on_recompile=number >= compiling):
                step(criterion, network, torch.randn(size, 6), torch.arange(size), weight).backward()
            assert not torch.equal(bank.pseudo_logits, before)


def same_bank_twice(criterion, x, index):
    return criterion(x, index), criterion(x.flip(0), index)


def rows_read_before_and_after(criterion, x, index):
    row = criterion.bank.pseudo_logits[2]
    before = row.sin()
    loss = criterion(x, index)
    return loss, before, row.sin(), criterion.bank.pseudo_logits.sin()


def logits_changed_in_place(criterion, x, index):
    y = x.clone()
    loss = criterion(y.mul_(2), index)
    return loss, y.add_(1).sin()


def logits_are_rows_of_the_bank(criterion, x, index):
    return (criterion(criterion.bank.pseudo_logits[:5], index),)


def logits_are_other_rows_of_the_bank(criterion, x, index):
    return (criterion(criterion.bank.pseudo_logits[6:11], index),)


def index_is_the_step_counter(criterion, x, index):
    return (criterion(x[:1], criterion.bank.updates),)


def logits_overwritten_by_their_gradient(criterion, x, index):
    y = x * 2
    loss, grad = d2_step(y, index, criterion.bank, out=y)
    return loss, grad.sin(), y.cos()


def logits_of_the_caller_overwritten(criterion, x, index):
    loss, grad = d2_step(x, index, criterion.bank, out=x)
    return loss, grad.sin(), x.add_(0.5)


def gradient_in_a_part_of_a_buffer(criterion, x, index):
    buffer = x.new_zeros(7, 30)
    loss, _ = d2_step(x, index, criterion.bank, out=buffer[1:6])
    return loss, buffer.sin()


ALIASES = (
    logits_overwritten_by_their_gradient,
    logits_of_the_caller_overwritten,
    gradient_in_a_part_of_a_buffer,
    same_bank_twice,
    rows_read_before_and_after,
    logits_changed_in_place,
    logits_are_rows_of_the_bank,
    logits_are_other_rows_of_the_bank,
    index_is_the_step_counter,
)


@COMPILERS
@pytest.mark.parametrize("program", ALIASES)
def test_inputs_that_share_memory_give_what_eager_gives(program, compiler):
    """The known hazard: compilers make the operator's writes functional, and then in place again where they think they may."""
    x, index = torch.randn(5, 30), torch.tensor([3, 1, 4, 0, 2])
    outcomes = []
    for run in (program, torch.compile(program, fullgraph=True, backend=compiler)):
        bank = make_bank(12, 30, labelled_every=0)
        criterion = FusedD2Loss(bank, label_lr=300.0)
        given = x.clone()
        results = [run(criterion, given, index) for _ in range(2)]
        outcomes.append((results, given, bank.pseudo_logits, bank.updates))
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("name", CPU_SIDE)
@pytest.mark.parametrize("classes", [10, 100])
def test_logits_in_the_bank_s_own_memory_are_read_before_it_is_written(name, classes):
    index = torch.randperm(20)
    results = []
    for copy in (False, True):
        bank = make_bank(20, classes, labelled_every=0)
        logits = bank.pseudo_logits.clone() if copy else bank.pseudo_logits
        step = d2_step(logits, index, bank, label_lr=300.0, backend=name)
        stepped = bank.pseudo_logits.clone()
        logits = stepped if copy else bank.pseudo_logits
        bank.predict_(index, logits, name)
        results.append((*step, stepped, bank.pseudo_logits))
    assert all(map(torch.equal, *results))


def eager(function):
    return function


def aot_eager(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def inductor(function):
    return torch.compile(function, fullgraph=True)


class TestVersionCounter:
    """So that autograd notices where a graph still needs the rows from before."""

    @pytest.mark.parametrize("how", [eager, aot_eager, inductor])
    def test_moves_with_the_bank(self, how):
        bank = make_bank(8, 20)
        step = how(d2_step)
        versions = [bank.pseudo_logits._version]
        for _ in range(2):
            step(torch.randn(8, 20), torch.arange(8), bank)
            versions.append(bank.pseudo_logits._version)
        bank.predict_(torch.arange(8), torch.randn(8, 20))
        versions.append(bank.pseudo_logits._version)
        assert versions == sorted(set(versions))

    def test_stays_where_the_bank_is_only_read(self):
        bank = make_bank(8, 20)
        before = bank.pseudo_logits._version
        d2_step(torch.randn(8, 20), torch.arange(8), bank, update=False)
        assert bank.pseudo_logits._version == before

    @pytest.mark.parametrize("how", [eager, aot_eager])
    def test_stops_a_backward_that_needs_the_rows_from_before(self, how):
        bank = make_bank(8, 20)
        weight = torch.ones(20, requires_grad=True)
        needs_rows = (bank.pseudo_logits * weight).sum()
        how(d2_step)(torch.randn(8, 20), torch.arange(8), bank)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            needs_rows.backward()


def test_compiled_training_may_overwrite_logits():
    torch.manual_seed(1)
    network, x = torch.nn.Linear(6, 30), torch.randn(12, 6)
    outcomes = []

    def gradient(bank, out):
        logits = network(x)
        return logits, d2_step(logits, torch.arange(12), bank, out=logits if out else None)[1]

    for run, out in ((gradient, False), (gradient, True), (aot_eager(gradient), True)):
        network.zero_grad()
        logits, grad = run(make_bank(40, 30), out)
        logits.backward(grad)
        outcomes.append(network.weight.grad)
    assert torch.equal(outcomes[0], outcomes[1])
    torch.testing.assert_close(outcomes[2], outcomes[0])


class TestCompiledErrors:
    """As clear as in eager mode, and as harmless."""

    def refuse(self, error, message, *, logits=None, index=None, **options):
        bank = make_bank(20, 30)
        before, steps = bank.pseudo_logits.clone(), bank.updates.clone()
        criterion = FusedD2Loss(bank)
        for name, value in options.items():
            setattr(criterion, name, value)
        step = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        with pytest.raises(error, match=message):
            step(
                torch.randn(4, 30) if logits is None else logits,
                torch.arange(4) if index is None else index,
            )
        assert torch.equal(bank.pseudo_logits, before)
        assert torch.equal(bank.updates, steps)

    def test_an_index_out_of_range(self):
        self.refuse(
            IndexError, r"index\[2\] is 20, but the bank holds samples 0 … 19", index=torch.tensor([1, 2, 20, 4])
        )

    def test_logits_of_another_width(self):
        """TorchDynamo wraps what is raised while it traces; ours is in its text."""
        self.refuse(RuntimeError, r"logits are \[4, 20\], but this bank has 30 classes", logits=torch.randn(4, 20))

    def test_memory_that_is_not_free_to_be_written(self):
        bank = make_bank(20, 30, labelled_every=0)
        before = bank.pseudo_logits.clone()
        step = torch.compile(d2_step, fullgraph=True, backend="eager")
        with pytest.raises(ValueError, match="out shares memory with the bank's rows"):
            step(torch.randn(4, 30), torch.arange(4), bank, out=bank.pseudo_logits[4:8])
        assert torch.equal(bank.pseudo_logits, before)

    def test_a_backend_that_is_not_there(self):
        self.refuse(BackendError, "backend 'cuda' cannot be used", backend="cuda")

    @pytest.mark.parametrize("weight", [math.nan, torch.tensor(math.nan)])
    def test_a_weight_that_is_not_finite(self, weight):
        self.refuse(ValueError, "alpha is nan.*must be finite", alpha=weight)

    def test_an_unknown_class_loss(self):
        self.refuse(ValueError, "class_loss is 'l1'; accepted: kl_reverse, kl, mse", class_loss="l1")

    @pytest.mark.parametrize("dynamic", [None, True])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reduction": "sum", "normalizer": 5.0}, "normalizer=5.0 is what reduction='mean' divides by"),
            ({"reduction": "avg"}, "reduction is 'avg'; accepted: mean, sum, none"),
            ({"normalizer": -5.0}, "normalizer is -5.0; it must be positive and finite"),
            ({"normalizer": "5"}, "normalizer is '5', of type str; pass a number"),
            ({"grad_scale": -2.0}, "grad_scale is -2.0; it must be positive and finite"),
        ],
    )
    def test_what_weights_of_samples_replace_is_checked_before(self, options, message, dynamic):
        """Within them the rows' losses are not reduced, so that the operator is not told of it."""
        bank = make_bank(20, 30)
        before, steps = bank.pseudo_logits.clone(), bank.updates.clone()
        step = torch.compile(d2_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with pytest.raises(RuntimeError, match=message):
            step(torch.randn(4, 30), torch.arange(4), bank, sample_weight=torch.ones(4), **options)
        assert torch.equal(bank.pseudo_logits, before)
        assert torch.equal(bank.updates, steps)
