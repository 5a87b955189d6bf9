"""One step of every GPU backend against float64: tests/test_step.py and the numbers of tests/test_rules.py, on a device."""

import pytest
import torch

from r2d2fast import BankError, PseudoLabelBank, d2_step, reference
from tests.cases import CLASS_LOSSES, DTYPES, make_bank
from tests.test_step import CLASSES, assert_agree, run_both

pytestmark = pytest.mark.gpu

# The sizes of tests/test_step.py, and the edges between several rows a warp, a warp a row, a block a row and two passes.
GPU_CLASSES = (*CLASSES, 32, 33, 63, 1001, 1023, 1024, 1025, 4096, 8191, 8193, 16_384, 21_841, 50_257)
NARROW_AND_WIDE = pytest.mark.parametrize("classes", [10, 100, 1001, 5000])


def check(backend, logits, index, *, samples=60, bank=None, scale=1.0, **step):
    """The backend agrees with the definition, both on the device."""
    options = {"samples": samples, "classes": logits.shape[1], "device": logits.device, **(bank or {})}
    ours, exact = run_both(backend, logits, index, options, **step)
    assert_agree(ours, exact, label_lr=step["label_lr"], scale=scale)
    return ours


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("classes", GPU_CLASSES)
def test_every_size(backend, device, classes, class_loss):
    logits, index = torch.randn(37, classes, device=device) * 3, torch.randint(0, 60, (37,), device=device)
    check(backend, logits, index, class_loss=class_loss, label_lr=40.0, normalizer=4.0)


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("classes", [5, 10, 33, 70, 129, 1000, 1001, 5000])
def test_every_dtype(backend, device, classes, class_loss, logits_dtype, bank_dtype):
    logits, index = torch.randn(23, classes, device=device) * 3, torch.randint(0, 40, (23,), device=device)
    ours = check(
        backend, logits.to(logits_dtype), index, bank={"dtype": bank_dtype}, class_loss=class_loss, label_lr=400.0
    )
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits_dtype


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_rows(backend, device, dtype, class_loss):
    logits = (torch.randn(3, 262_144, device=device) * 3).to(dtype)
    check(backend, logits, torch.tensor([2, 0, 1], device=device), class_loss=class_loss, label_lr=40.0)


@pytest.mark.parametrize(("rows", "classes"), [(1, 10), (100_003, 2), (70_001, 10), (20_011, 100), (5003, 1000)])
def test_many_rows(backend, device, rows, classes):
    """Many blocks: the ordered sum of the loss, the last block that adds it up, duplicates far apart."""
    logits, index = torch.randn(rows, classes, device=device), torch.randint(0, 2 * rows, (rows,), device=device)
    check(backend, logits, index, samples=2 * rows, label_lr=40.0, normalizer=float(rows), update_normalizer=1.0)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("size", [1e2, 1e4])
@NARROW_AND_WIDE
def test_gaps_beyond_the_range_of_exp(backend, device, classes, size, class_loss):
    logits, index = torch.randn(20, classes, device=device) * size, torch.arange(20, device=device)
    check(backend, logits, index, samples=20, bank={"scale": size}, class_loss=class_loss, label_lr=1.0, scale=size)


@NARROW_AND_WIDE
def test_labelled_rows_alone(backend, device, classes):
    bank = make_bank(60, classes, device=device)
    before = bank.pseudo_logits.clone()
    labelled = torch.arange(0, 60, 3, device=device)
    logits = torch.randn(20, classes, device=device)
    check(backend, logits, labelled, label_lr=1e4)
    d2_step(logits, labelled, bank, label_lr=1e4, backend=backend)
    assert torch.equal(bank.pseudo_logits, before)


@NARROW_AND_WIDE
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_unaligned_slices(backend, device, classes, dtype):
    wide = torch.randn(9, classes + 13, device=device).to(dtype)
    index = torch.arange(18, dtype=torch.int32, device=device)[::2]
    for start in range(4):
        view = wide[:, start : start + classes]
        expected = d2_step(view.clone(), index.long(), make_bank(18, classes, device=device), backend=backend)
        for logits in (view, wide.t().contiguous().t()[:, start : start + classes]):
            bank = make_bank(18, classes, device=device)
            for ours, same in zip(d2_step(logits, index, bank, backend=backend), expected, strict=True):
                assert torch.equal(ours, same)


@NARROW_AND_WIDE
def test_an_empty_batch(backend, device, classes):
    bank = make_bank(5, classes, device=device)
    before = bank.pseudo_logits.clone()
    index = torch.empty(0, dtype=torch.int64, device=device)
    loss, grad = d2_step(torch.empty(0, classes, device=device), index, bank, backend=backend)
    assert loss.item() == 0
    assert grad.shape == (0, classes)
    assert torch.equal(bank.pseudo_logits, before)


@NARROW_AND_WIDE
@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_logit_harms_nothing_else(backend, device, classes, bad, class_loss):
    """Rule 6."""
    others = torch.arange(20, device=device) != 7
    for position in (0, classes - 1):
        logits = torch.randn(20, classes, device=device)
        spoilt = logits.clone()
        spoilt[7, position] = bad
        bank, clean = (make_bank(20, classes, labelled_every=0, device=device) for _ in range(2))
        before = bank.pseudo_logits.clone()
        options = {"label_lr": 500.0, "class_loss": class_loss, "backend": backend}
        loss, grad = d2_step(spoilt, torch.arange(20, device=device), bank, **options)
        _, clean_grad = d2_step(logits, torch.arange(20, device=device), clean, **options)
        assert loss.isnan()
        assert grad[7].isnan().all()
        assert torch.equal(grad[others], clean_grad[others])
        assert torch.equal(bank.pseudo_logits[others], clean.pseudo_logits[others])
        assert torch.equal(bank.pseudo_logits[7], before[7])


@NARROW_AND_WIDE
@pytest.mark.parametrize("bad", [-1, 20, 2**40, -(2**40)])
def test_an_index_out_of_range_writes_nothing_and_is_remembered(backend, device, classes, bad):
    """Rule 6: the host does not wait, so the bank remembers."""
    bank, clean = make_bank(20, classes, device=device), make_bank(20, classes, device=device)
    logits, index = torch.randn(4, classes, device=device), torch.tensor([1, 2, bad, 4], device=device)
    kept = torch.tensor([0, 1, 3], device=device)
    d2_step(logits[kept], index[kept], clean, normalizer=4.0, backend=backend)
    clean.check()
    loss, grad = d2_step(logits, index, bank, backend=backend)
    assert loss.isnan()
    assert grad[2].isnan().all()
    assert torch.equal(bank.pseudo_logits, clean.pseudo_logits)
    for _ in range(2):
        with pytest.raises(BankError, match="an index outside"):
            bank.check()
    bank.load_state_dict(clean.state_dict())
    bank.check()


@NARROW_AND_WIDE
def test_predict_sets_the_last_of_duplicates_and_remembers_what_it_skipped(backend, device, classes):
    bank = make_bank(12, classes, labelled_every=4, device=device)
    before = bank.pseudo_logits.clone()
    index = torch.tensor([1, 0, 1, 5, 9, 1, 10], device=device)  # 0 is labelled
    logits = torch.randn(7, classes, device=device)
    expected = before.clone()
    rows = bank.slots[index].long()
    expected[rows[[5, 3, 4, 6]]] = logits[[5, 3, 4, 6]]
    bank.predict_(index, logits, backend)
    assert torch.equal(bank.pseudo_logits, expected)
    bank.check()

    logits = torch.randn(7, classes, device=device)
    logits[3, -1], logits[4, 0] = torch.nan, torch.inf
    expected[rows[[5, 6]]] = logits[[5, 6]]
    bank.predict_(index, logits, backend)
    assert torch.equal(bank.pseudo_logits, expected)
    with pytest.raises(BankError, match="predictions that are not finite"):
        bank.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
def test_predict_rounds_to_the_bank_s_dtype(backend, device, dtype, logits_dtype):
    bank = make_bank(4, 67, labelled_every=0, dtype=dtype, device=device)
    logits = torch.randn(4, 67, device=device).to(logits_dtype)
    bank.predict_(torch.arange(4, device=device), logits, backend)
    assert torch.equal(bank.pseudo_logits, logits.to(dtype))
    bank.predict_(torch.arange(4, device=device), torch.full_like(logits, 6e4), backend)
    assert bank.pseudo_logits.isfinite().all()


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (3000, 100), (1000, 1000), (100, 21_841)])
@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_equal_steps_give_equal_bits(backend, device, rows, classes, class_loss):
    """Rules 4 and 5: a race would show in some of 20 runs over a batch full of duplicates."""
    logits, index = torch.randn(rows, classes, device=device), torch.randint(0, 40, (rows,), device=device)
    first = None
    for _ in range(20):
        bank = make_bank(40, classes, device=device)
        results = (
            *d2_step(logits, index, bank, class_loss=class_loss, label_lr=500.0, backend=backend),
            bank.pseudo_logits,
        )
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@NARROW_AND_WIDE
def test_stochastic_rounding_is_the_definition_s(backend, device, classes, dtype):
    """Rule 11: same seed, step and element, same bits, but where float32 arithmetic differs in its last place."""
    options = {"labelled_every": 0, "dtype": dtype, "rounding": "stochastic", "seed": 2**40 + 7, "scale": 0.01}
    ours, exact = (make_bank(64, classes, device=device, **options) for _ in range(2))
    index = torch.randperm(64, device=device)
    for step in range(3):
        logits = torch.randn(64, classes, device=device)
        ours.pseudo_logits.copy_(exact.pseudo_logits)
        d2_step(logits, index, ours, label_lr=5.0, update_normalizer=1.0, backend=backend)
        reference.d2_step(logits, index, exact, label_lr=5.0, update_normalizer=1.0)
        assert int(ours.step) == step + 1
        assert (ours.pseudo_logits != exact.pseudo_logits).float().mean() < 0.005


def test_offsets_are_64_bits(backend, device):
    """Rule 12."""
    classes, samples = 262_144, 8200
    assert samples * classes > 2**31
    if torch.cuda.mem_get_info(device)[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of GPU memory are free")
    bank = PseudoLabelBank(torch.full((samples,), -1), classes, dtype=torch.bfloat16, device=device)
    small = PseudoLabelBank(torch.full((1,), -1), classes, dtype=torch.bfloat16, device=device)
    logits = torch.randn(1, classes, device=device)
    for target, sample in ((bank, samples - 1), (small, 0)):
        index = torch.tensor([sample], device=device)
        target.predict_(index, logits, backend)
        d2_step(logits * 0.5, index, target, label_lr=1e5, backend=backend)
    assert torch.equal(bank.pseudo_logits[-1], small.pseudo_logits[0])
    assert not torch.equal(small.pseudo_logits[0], logits[0].bfloat16())
    assert not bank.pseudo_logits[:-1].any()


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@NARROW_AND_WIDE
def test_like_the_cpu_backend(backend, device, classes, class_loss):
    """Two independent kernels: so does the other GPU backend, then."""
    logits, index = torch.randn(64, classes) * 3, torch.randint(0, 80, (64,))
    options = {"class_loss": class_loss, "label_lr": 40.0}
    theirs, ours = make_bank(80, classes), make_bank(80, classes, device=device)
    expected = (*d2_step(logits, index, theirs, **options), theirs.pseudo_logits)
    results = (*d2_step(logits.to(device), index.to(device), ours, backend=backend, **options), ours.pseudo_logits)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), other, rtol=1e-4, atol=1e-6)
