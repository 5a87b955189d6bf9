"""What only the Triton backend has: its tiles, its long rows, scalars that are read on the device."""

import importlib.util
import sys

import pytest
import torch

from r2d2fast import BankError, FusedD2Loss, d2_step, reference
from r2d2fast._backends import triton
from r2d2fast.options import CLASS_LOSSES, StepOptions
from r2d2fast.testing import make_bank
from tests.cases import slow_but

if problem := triton.why_not(torch.zeros(1, 2), torch.zeros(1, 2)):
    pytest.skip(problem, allow_module_level=True)

from r2d2fast.kernels.tiles import ONE_READ, PIECE, tile_of
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.interpreter import observed, patch_interpreter

patch_interpreter()

LONG = ONE_READ + PIECE // 2 + 3


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """For tensors as small as these, PyTorch's threads take longer to meet than to work."""
    torch.set_num_threads(1)


def agree(actual, exact, scale=1.0):
    torch.testing.assert_close(actual.double(), exact.double(), rtol=2e-6, atol=2e-7 * scale)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_long_rows_keep_all_rules(class_loss):
    """Duplicates, labelled samples, a row that is not finite, maxima that come late, statistics."""
    banks = make_bank(9, LONG), make_bank(9, LONG)
    index = torch.tensor([4, 1, 4, 0, 0, 4, 7, 5])
    logits = torch.randn(8, LONG) * 3 + torch.linspace(0, 9, LONG)
    logits[1] = banks[0].pseudo_logits[banks[0].slots[1]]
    logits[1, LONG - 1] = 40  # until here its largest class is that of its pseudo-logits
    logits[6, LONG - 1] = float("inf")
    logits[7] = banks[0].pseudo_logits[banks[0].slots[5]]  # and here it stays so
    criteria = [
        FusedD2Loss(bank, label_lr=50.0, class_loss=class_loss, normalizer=4.0, statistics=True, backend=name)
        for bank, name in zip(banks, ("triton", "reference"), strict=True)
    ]
    results = []
    for criterion in criteria:
        leaf = logits.clone().requires_grad_()
        loss = criterion(leaf, index)
        (2 * loss).backward()
        results.append((loss, leaf.grad))
    others = torch.arange(8) != 6
    assert results[0][0].isnan()
    assert results[0][1][6].isnan().all()
    agree(results[0][1][others], results[1][1][others])
    agree(banks[0].pseudo_logits, banks[1].pseudo_logits, scale=50)
    found, exact = (criterion.read_statistics() for criterion in criteria)
    assert found == pytest.approx(exact, rel=1e-5)
    assert found["agreement"] > 0


@pytest.mark.parametrize("classes", [10, LONG])
def test_a_step_that_was_cut_short_is_noticed(classes):
    """Its programs have left a ticket behind: no later loss is a number until the bank is mended."""
    logits, index, bank = torch.randn(6, classes), torch.arange(6), make_bank(9, classes)
    bank.status[0] = 12345
    for _ in range(2):
        assert d2_step(logits, index, bank, backend="triton")[0].isnan()
    with pytest.raises(BankError, match="cut short"):
        bank.check()
    bank.load_state_dict(bank.state_dict())
    assert d2_step(logits, index, bank, backend="triton")[0].isfinite()


@pytest.mark.parametrize("classes", [7, 30, 1000, LONG])
def test_rows_of_a_bank_may_lie_apart(classes):
    """As those of a pinned one do; what is between them stays."""
    plain, apart = make_bank(12, classes), make_bank(12, classes)
    wide = torch.full((len(apart.pseudo_logits), classes + 9), 7.0)
    wide[:, :classes] = apart.pseudo_logits
    apart.pseudo_logits = wide[:, :classes]
    index, logits = torch.tensor([3, 1, 2, 11, 1]), torch.randn(5, classes)
    for bank in (plain, apart):
        bank.predict_(torch.tensor([4, 5]), logits[:2], "triton")
        d2_step(logits, index, bank, label_lr=50.0, backend="triton")
    assert torch.equal(apart.pseudo_logits, plain.pseudo_logits)
    assert (wide[:, classes:] == 7).all()


@pytest.mark.parametrize("classes", [2, 20, 40, 80, 150, 300, 600, 1300, 3000, 5000, LONG])
def test_every_tile_agrees_with_the_definition(classes):
    """More rows than one program has, in each entry of the table, some of them in another program's tile as well."""
    rows = 2 * tile_of(classes).rows + 1
    index = torch.arange(rows) % (rows - 1) + 1
    logits = torch.randn(rows, classes) * 3
    banks = [make_bank(rows + 1, classes, label_scale=7.0) for _ in range(2)]
    for _ in range(2):
        loss, grad = d2_step(logits, index, banks[0], label_lr=50.0, backend="triton")
        exact = reference.d2_step(logits, index, banks[1], label_lr=50.0)
        agree(loss, exact.loss, scale=10)
        agree(grad, exact.grad)
        agree(banks[0].pseudo_logits, banks[1].pseudo_logits, scale=50)
    assert int(banks[0].updates) == 2
    assert banks[0].status.tolist() == [0, 0]


@pytest.mark.parametrize("classes", [10, LONG])
@pytest.mark.parametrize("name", ["alpha", "beta", "label_lr", "grad_scale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scalar_that_is_not_finite_harms_no_row(classes, name, bad):
    """On a GPU no one can know but the kernel."""
    bank = make_bank(6, classes)
    before = bank.pseudo_logits.clone()
    scalars = dict.fromkeys(("alpha", "beta", "label_lr", "grad_scale"), 1.0) | {name: torch.tensor(bad)}
    step = StepOptions(**scalars)
    loss, grad = triton.step(torch.randn(4, classes), torch.arange(4), bank, step, None)
    assert loss.isnan()
    assert grad.isnan().all()
    assert torch.equal(bank.pseudo_logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", slow_but([16, 104, LONG, LONG + 5], [16, LONG]))
def test_random_bits_are_the_definition_s(classes, dtype):
    """Eight elements share one computation where N is a multiple of 8; long rows go on counting from piece to piece."""
    rows = 60 if classes < 1000 else 4
    banks = [make_bank(rows, classes, dtype=dtype, rounding="stochastic", seed=2**40 + 7, scale=0.01) for _ in range(2)]
    for bank in banks:
        bank.updates.fill_(2**32 + 5)
    for _ in range(2):
        logits = torch.randn(rows, classes)
        banks[0].pseudo_logits.copy_(banks[1].pseudo_logits)
        d2_step(logits, torch.arange(rows), banks[0], label_lr=5.0, backend="triton")
        reference.d2_step(logits, torch.arange(rows), banks[1], label_lr=5.0)
        assert (banks[0].pseudo_logits != banks[1].pseudo_logits).float().mean() < 0.004


def test_random_bits_of_subnormals():
    """Their spacing in float16 does not go on halving."""
    banks = [make_bank(60, 16, dtype=torch.float16, rounding="stochastic", scale=2e-5) for _ in range(2)]
    logits = torch.randn(60, 16)
    d2_step(logits, torch.arange(60), banks[0], label_lr=0.01, backend="triton")
    reference.d2_step(logits, torch.arange(60), banks[1], label_lr=0.01)
    assert (banks[0].pseudo_logits != banks[1].pseudo_logits).float().mean() < 0.004


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize(("bad", "classes"), [(float("nan"), 10), (float("inf"), 10), (float("inf"), LONG)])
def test_a_row_of_the_bank_that_is_not_finite_harms_nothing_else(bad, classes, class_loss):
    """A bad row harms nothing else, also where the bank was damaged."""
    bank, clean = (make_bank(4, classes, labelled_every=0) for _ in range(2))
    bank.pseudo_logits[2, classes - 1] = bad
    damaged, logits = bank.pseudo_logits[2].clone(), torch.randn(4, classes)
    options = {"class_loss": class_loss, "label_lr": 50.0, "backend": "triton"}
    (loss, grad), (_, clean_grad) = (d2_step(logits, torch.arange(4), each, **options) for each in (bank, clean))
    assert loss.isnan()
    assert grad[2].isnan().all()
    assert torch.equal(bank.pseudo_logits[2].nan_to_num(7.0), damaged.nan_to_num(7.0))
    others = torch.arange(4) != 2
    assert torch.equal(grad[others], clean_grad[others])
    assert torch.equal(bank.pseudo_logits[others], clean.pseudo_logits[others])


@pytest.mark.parametrize("classes", [10, 300, LONG])
def test_programs_may_run_in_any_order(classes, monkeypatch):
    """The interpreter runs programs in their order, in which the last occurrence would be the last to write anyway."""
    index = torch.tensor([1, 2, 1, 4, 5, 1, 7, 2, 8, 1, 10])
    logits = torch.randn(len(index), classes)
    results = []
    forwards = InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):
        forwards(self, self.grid_dim[0] - 1 - x, y, z)

    for order in (forwards, backwards):
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", order)
        predicted, stepped = make_bank(12, classes), make_bank(12, classes)
        predicted.predict_(index, logits, "triton")
        results.append((*d2_step(logits, index, stepped, label_lr=50.0, backend="triton"), stepped.pseudo_logits))
        assert all(map(torch.equal, results[0], results[-1]))
        assert torch.equal(predicted.logits(index[[9, 7, 10]]), logits[[9, 7, 10]])


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("where", ["logits", "bank"])
@pytest.mark.parametrize("rise", [1e33, -1e33, 60.0])
def test_a_long_row_may_climb_from_piece_to_piece(where, rise, class_loss):
    """Numerics: each piece is so far above the one before that, but for the smallest rise, all before it underflows."""
    classes = (4 if rise == 60.0 else 16) * PIECE + 5
    bank, exact_bank = (make_bank(1, classes, labelled_every=0, scale=0.1) for _ in range(2))
    logits = torch.randn(1, classes)
    for row in (logits,) if where == "logits" else (bank.pseudo_logits, exact_bank.pseudo_logits):
        row += torch.arange(classes) // PIECE * rise
    options = {"class_loss": class_loss, "label_lr": 1.0}
    loss, grad = d2_step(logits, torch.tensor([0]), bank, backend="triton", **options)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert bank.pseudo_logits.isfinite().all()
    if rise == 60.0:
        exact = reference.d2_step(logits, torch.tensor([0]), exact_bank, **options)
        agree(loss, exact.loss)
        agree(grad, exact.grad, scale=10)
        agree(bank.pseudo_logits, exact_bank.pseudo_logits, scale=100)


@pytest.mark.parametrize("classes", [2, 30])
def test_occurrences_may_be_far_apart(classes):
    """Further than a search looks at once, and than the sum of the losses takes at once."""
    rows = tile_of(classes).span + 9
    index = torch.arange(rows) + 20
    index[[0, tile_of(classes).span + 1, rows - 4, rows - 3, rows - 2]] = 1
    index[[3, rows - 1]] = 2
    logits = torch.randn(rows, classes)
    predicted, *banks = (make_bank(rows + 20, classes) for _ in range(3))
    predicted.predict_(index, logits, "triton")
    loss, grad = d2_step(logits, index, banks[0], label_lr=500.0, backend="triton")
    exact = reference.d2_step(logits, index, banks[1], label_lr=500.0)
    agree(loss, exact.loss)
    agree(grad, exact.grad)
    agree(banks[0].pseudo_logits, banks[1].pseudo_logits, scale=100)
    assert torch.equal(predicted.logits(torch.tensor([1, 2])), logits[-2:])


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("classes", [2, 30, 1000, LONG])
def test_one_pass(classes, class_loss):
    """One pass: each logit and bank element is read once (in rows beyond ONE_READ twice, for mse three times) and each gradient
    and bank element written once; labelled samples own no row, and none is touched."""
    bank = make_bank(9, classes)
    index, logits = torch.tensor([4, 1, 0, 2, 7, 3]), torch.randn(6, classes)
    moved = torch.zeros(6, 1, dtype=torch.int64)
    moved[bank.slots[index[bank.slots[index] >= 0]].long()] = 1
    with observed() as accesses:
        _, grad = d2_step(logits, index, bank, class_loss=class_loss, backend="triton")
    passes = 1 if classes <= ONE_READ else 3 if class_loss == "mse" else 2
    assert (accesses.reads(logits) == passes).all()
    assert (accesses.reads(bank.pseudo_logits) == passes * moved).all()
    assert (accesses.writes(grad) == 1).all()
    assert (accesses.writes(bank.pseudo_logits) == moved).all()
    assert accesses.reads(grad).sum() + accesses.writes(logits).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_reads_and_writes_only_what_it_must(dtype):
    """The update never depends on the upstream gradient, and a factor of 1 costs no pass."""
    for factor, keep in ((1.0, False), (0.5, False), (1.0, True), (0.5, True)):
        grad = torch.randn(3, 700).to(dtype)
        before = grad.clone()
        with observed() as accesses:
            out = triton.scale_gradient(grad, torch.tensor(8 * factor), 8.0, keep)
        assert torch.equal(out, (before.float() * factor).to(dtype))
        assert torch.equal(grad, before if keep else out)
        assert (accesses.reads(grad) == (keep or factor != 1)).all()
        assert (accesses.writes(out) == (keep or factor != 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, LONG])
def test_predictions_saturate(classes, dtype):
    bank = make_bank(4, classes, dtype=dtype, labelled_every=0)
    largest = torch.finfo(dtype).max
    logits = torch.linspace(-1, 1, 4 * classes).view(4, classes) * 3.4e38
    bank.predict_(torch.arange(4), logits, "triton")
    assert torch.equal(bank.pseudo_logits, logits.clamp(-largest, largest).to(dtype))


def test_without_the_kernels_the_backend_says_what_to_do(monkeypatch):
    """In a checkout that was never installed: setup.py is what makes ``kernels/`` ``r2d2fast.kernels``."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "r2d2fast.kernels" else find(name))
    monkeypatch.setitem(sys.modules, "r2d2fast.kernels", None)
    monkeypatch.setattr(triton, "_problem", triton._problem.__wrapped__)
    monkeypatch.setattr(triton, "_interpreted", triton._interpreted.__wrapped__)
    assert not triton.status().available
    for detail in (triton.status().detail, triton.why_not(torch.zeros(1, 2), torch.zeros(1, 2))):
        assert "r2d2fast.kernels is not installed" in detail
        assert "pip install -e ." in detail
