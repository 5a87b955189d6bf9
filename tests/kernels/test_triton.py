"""What only the Triton backend has: its tiles, its long rows, scalars that are read on the device."""

import pytest
import torch

from r2d2fast import FusedD2Loss, d2_step, reference
from r2d2fast._backends import triton
from r2d2fast._backends.common import Step
from tests.cases import CLASS_LOSSES, make_bank

if problem := triton.why_not(torch.zeros(1, 2), torch.zeros(1, 2)):
    pytest.skip(problem, allow_module_level=True)

from r2d2fast.kernels.tiles import ONE_READ, PIECE, tile_of
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.interpreter import mend

mend()

LONG = ONE_READ + PIECE // 2 + 3


def agree(actual, exact, scale=1.0):
    torch.testing.assert_close(actual.double(), exact.double(), rtol=2e-6, atol=2e-7 * scale)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_long_rows_keep_all_rules(class_loss):
    """Duplicates, labelled samples, a row that is not finite, maxima that come late, statistics."""
    banks = make_bank(9, LONG), make_bank(9, LONG)
    index = torch.tensor([4, 1, 4, 0, 2, 4, 7, 5])
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
    banks = make_bank(rows + 1, classes), make_bank(rows + 1, classes)
    for _ in range(2):
        loss, grad = d2_step(logits, index, banks[0], label_lr=50.0, backend="triton")
        exact = reference.d2_step(logits, index, banks[1], label_lr=50.0)
        agree(loss, exact.loss, scale=10)
        agree(grad, exact.grad)
        agree(banks[0].pseudo_logits, banks[1].pseudo_logits, scale=50)
    assert int(banks[0].step) == 2
    assert banks[0].status.tolist() == [0, 0]


@pytest.mark.parametrize("classes", [10, LONG])
@pytest.mark.parametrize("name", ["alpha", "beta", "label_lr", "grad_scale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scalar_that_is_not_finite_harms_no_row(classes, name, bad):
    """On a GPU no one can know but the kernel."""
    bank = make_bank(6, classes)
    before = bank.pseudo_logits.clone()
    scalars = dict.fromkeys(("alpha", "beta", "label_lr", "grad_scale"), 1.0) | {name: torch.tensor(bad)}
    step = Step(**scalars, class_loss="kl_reverse", normalizer=None, update_normalizer=None, update=True)
    loss, grad = triton.step(torch.randn(4, classes), torch.arange(4), bank, step, None)
    assert loss.isnan()
    assert grad.isnan().all()
    assert torch.equal(bank.pseudo_logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [16, 104, LONG, LONG + 5])
def test_random_bits_are_the_definition_s(classes, dtype):
    """Eight elements share one computation where N is a multiple of 8; long rows go on counting from piece to piece."""
    rows = 60 if classes < 1000 else 4
    banks = [make_bank(rows, classes, dtype=dtype, rounding="stochastic", seed=2**40 + 7, scale=0.01) for _ in range(2)]
    for _ in range(2):
        logits = torch.randn(rows, classes)
        banks[0].pseudo_logits.copy_(banks[1].pseudo_logits)
        d2_step(logits, torch.arange(rows), banks[0], label_lr=5.0, backend="triton")
        reference.d2_step(logits, torch.arange(rows), banks[1], label_lr=5.0)
        assert (banks[0].pseudo_logits != banks[1].pseudo_logits).float().mean() < 0.004


@pytest.mark.parametrize("classes", [10, 300, LONG])
def test_programs_may_run_in_any_order(classes, monkeypatch):
    """Rules 4 and 5: the interpreter runs them in theirs, in which the last occurrence would be the last to write anyway."""
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
