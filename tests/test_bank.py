"""The bank by itself: what it holds, where, and what bad use gets."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from r2d2fast import BankError, PseudoLabelBank, d2_step
from r2d2fast.bank import DTYPES
from r2d2fast.testing import make_bank
from tests.sizes import NARROW_AND_WIDE

LABELS = torch.tensor([-1, 2, -1, 0, -1])


def test_holds_a_row_for_each_unlabelled_sample():
    bank = PseudoLabelBank(LABELS, num_classes=3)
    assert len(bank) == 5
    assert bank.pseudo_logits.shape == (3, 3)
    assert bank.slots.tolist() == [0, -3, 1, -1, 2]
    assert bank.nbytes == 3 * 3 * 4
    torch.testing.assert_close(bank.probs(torch.tensor([0, 2])), torch.full((2, 3), 1 / 3))


def test_predict_sets_logits_probs_and_hard_labels(backend):
    bank = PseudoLabelBank(LABELS, num_classes=3, device=torch.get_default_device())
    logits = torch.tensor([[0.0, 3, 1], [9, 9, 9], [5, 1, 0], [9, 9, 9], [0, 1, 2]])
    bank.predict_(torch.arange(5), logits, backend)
    expected = logits.clone()
    expected[1], expected[3] = torch.tensor([0.0, 0, 10]), torch.tensor([10.0, 0, 0])
    assert torch.equal(bank.logits(torch.arange(5)), expected)
    torch.testing.assert_close(bank.probs(torch.arange(5)), expected.softmax(1))
    assert bank.hard_labels().tolist() == [1, 2, 0, 0, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", [*DTYPES, torch.float64])
def test_predict_rounds_to_the_bank_s_dtype(backend, dtype, logits_dtype):
    if logits_dtype == torch.float64:
        backend = "auto"
    bank = make_bank(4, 67, labelled_every=0, dtype=dtype)
    logits = torch.randn(4, 67).to(logits_dtype)
    bank.predict_(torch.arange(4), logits.requires_grad_(), backend)
    assert torch.equal(bank.pseudo_logits, logits.detach().to(dtype))
    bank.predict_(torch.arange(4), torch.full_like(logits, torch.finfo(logits_dtype).max), backend)
    assert bank.pseudo_logits.isfinite().all()


@NARROW_AND_WIDE
def test_predict_takes_the_last_of_duplicates(backend, classes):
    bank = make_bank(12, classes, labelled_every=4)
    expected = bank.pseudo_logits.clone()
    index = torch.tensor([1, 0, 1, 5, 9, 1, 10])  # 0 is labelled
    logits = torch.randn(7, classes)
    expected[bank.slots[index[3:]].long()] = logits[[3, 4, 5, 6]]
    bank.predict_(index, logits, backend)
    assert torch.equal(bank.pseudo_logits, expected)
    bank.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predict_names_non_finite_logits_and_sets_the_others(backend, bad):
    bank = make_bank(6, 10, labelled_every=0)
    before = bank.pseudo_logits.clone()
    logits = torch.randn(6, 10)
    logits[2, 9] = logits[4, 0] = bad
    if backend in ("cuda", "triton"):
        bank.predict_(torch.arange(6).flip(0), logits, backend)
        with pytest.raises(BankError, match="met predictions that are not finite since it was made"):
            bank.check()
    else:
        with pytest.raises(ValueError, match=r"2 of 6 rows of logits are not finite, first for sample 3"):
            bank.predict_(torch.arange(6).flip(0), logits, backend)
    kept = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(bank.pseudo_logits[kept], before[kept])
    assert torch.equal(bank.pseudo_logits[~kept], logits.flip(0)[~kept])


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        LABELS.numpy(),
        LABELS.numpy().astype(">i2"),
        LABELS.to(torch.int8),
        np.broadcast_to(LABELS.numpy(), (2, 5))[1],  # read-only
    ],
)
def test_labels_of_any_integers(labels):
    assert torch.equal(PseudoLabelBank(labels, np.int64(3)).slots, PseudoLabelBank(LABELS, 3).slots)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS.float()}, "labels are torch.float32; pass integers, -1 for an unlabelled sample"),
        ({"labels": LABELS.numpy() < 0}, "labels are bool; pass integers"),
        ({"labels": ["cat", "dog"]}, "labels are <U3; pass integers"),
        ({"num_classes": 10.0}, "num_classes is 10.0; pass an int"),
        ({"label_scale": "10"}, "label_scale is '10', of type str; pass a number"),
    ],
)
def test_what_is_no_integer_is_named(options, message):
    with pytest.raises(TypeError, match=message):
        PseudoLabelBank(**{"labels": LABELS, "num_classes": 3, **options})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3, -1]), r"labels\[1\] is 3 \(1 such\); a label is 0 … 2, or -1"),
        (torch.tensor([0, -2, -5]), r"labels\[1\] is -2 \(2 such\)"),
        (torch.tensor([[0, 1]]), r"labels are \[1, 2\]; pass \[M\], one label a sample"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        PseudoLabelBank(labels, num_classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; it must be 2 … 262144"),
        ({"num_classes": 262_145}, "num_classes is 262145"),
        ({"dtype": torch.float64}, "dtype is torch.float64; accepted: torch.float32, torch.bfloat16, torch.float16"),
        ({"rounding": "up"}, "rounding is 'up'; accepted: nearest, stochastic"),
        ({"rounding": "stochastic"}, "16-bit banks"),
        ({"storage": "pinned"}, "storage 'pinned' is for the kernels of a GPU, and .*; use 'device' or a path"),
        ({"label_scale": -3.0}, "label_scale is -3.0; it must be positive and finite"),
        ({"label_scale": float("nan")}, "label_scale is nan"),
        ({"seed": -1}, "seed is -1; it must be 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PseudoLabelBank(**{"labels": LABELS, "num_classes": 3, **options})


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_beyond_a_dtype_saturate_on_every_way_in(dtype):
    largest = torch.finfo(dtype).max
    huge = make_bank(2, 4, labelled_every=0)
    huge.pseudo_logits.fill_(-3.4e38)
    predicted, loaded = (make_bank(2, 4, labelled_every=0, dtype=dtype) for _ in range(2))
    predicted.predict_(torch.arange(2), huge.pseudo_logits)
    loaded.load_state_dict(huge.state_dict())
    huge.to(dtype=dtype)
    expected = max(-3.4e38, -largest)
    for bank in (predicted, loaded, huge):
        torch.testing.assert_close(bank.pseudo_logits.float(), torch.full((2, 4), expected), rtol=0.01, atol=0)


def test_stochastic_rounding_never_reaches_a_float32_bank():
    stochastic = make_bank(2, 4, dtype=torch.bfloat16, rounding="stochastic")
    with pytest.raises(ValueError, match="16-bit banks"):
        stochastic.to(dtype=torch.float32)
    loaded = make_bank(2, 4)
    loaded.load_state_dict(stochastic.state_dict())
    assert loaded.rounding == "nearest"
    assert torch.equal(loaded.pseudo_logits, stochastic.pseudo_logits.float())
    assert stochastic.dtype == torch.bfloat16


def test_index_dtype_is_named():
    with pytest.raises(TypeError, match=r"index is torch\.float32; pass int64 or int32"):
        make_bank(2, 4).logits(torch.zeros(1))


def test_to_casts_in_place():
    bank = make_bank(6, 10)
    before = bank.pseudo_logits.clone()
    assert bank.to(dtype=torch.bfloat16) is bank
    assert bank.dtype == torch.bfloat16
    assert torch.equal(bank.pseudo_logits, before.bfloat16())
    with pytest.raises(ValueError, match=r"torch\.float64"):
        bank.to(dtype=torch.float64)


def test_check_names_a_damaged_row():
    bank = make_bank(6, 10, labelled_every=3)
    bank.check()
    bank.pseudo_logits[2, 5] = float("nan")
    with pytest.raises(BankError, match=r"1 rows of .* are not finite, first that of sample 4"):
        bank.check()


class TestState:
    def test_round_trip_through_a_file(self, tmp_path):
        saved, loaded = (make_bank(6, 10, dtype=torch.bfloat16, rounding="stochastic", seed=s) for s in (5, 6))
        d2_step(torch.randn(6, 10), torch.arange(6), saved)
        torch.save(saved.state_dict(), tmp_path / "bank.pt")
        loaded.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
        logits = torch.randn(6, 10)
        for bank in (saved, loaded):
            d2_step(logits, torch.arange(6), bank)
        assert torch.equal(saved.pseudo_logits, loaded.pseudo_logits)
        assert torch.equal(saved.updates, loaded.updates)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_of_another_dtype_leaves_the_bank_its_rounding(self, dtype):
        """Steps below the bank's resolution go on adding up after rows of a bank that rounds otherwise were loaded."""
        bank = make_bank(6, 10, dtype=torch.bfloat16, rounding="stochastic", seed=7, labelled_every=0)
        state = make_bank(6, 10, dtype=dtype, seed=8, labelled_every=0).state_dict()
        state["pseudo_logits"].fill_(5.0)
        bank.load_state_dict(state)
        assert (bank.pseudo_logits == 5.0).all()
        assert (bank.rounding, bank.seed) == ("stochastic", 7)
        logits = torch.randn(6, 10)
        for _ in range(100):
            d2_step(logits, torch.arange(6), bank, label_lr=0.5)
        assert (bank.pseudo_logits != 5.0).any()

    def test_of_another_bank_is_refused_with_nothing_changed(self):
        bank = make_bank(6, 10)
        before = bank.pseudo_logits.clone()
        other_split = make_bank(6, 10).state_dict()
        other_split["slots"] = other_split["slots"].flip(0)
        incomplete = make_bank(6, 10).state_dict()
        del incomplete["updates"]
        for state, message in (
            (make_bank(6, 11).state_dict(), r"rows are \(4, 11\), this bank's \(4, 10\)"),
            (other_split, "other labels"),
            (incomplete, "lacks updates"),
        ):
            with pytest.raises(BankError, match=message):
                bank.load_state_dict(state)
        assert torch.equal(bank.pseudo_logits, before)


class TestCopies:
    """Of a bank in a file or in pinned memory: where they say that they are, they are."""

    def make(self, kind, tmp_path):
        if kind == "mapped":
            return make_bank(6, 10, storage=tmp_path / "bank")
        bank = make_bank(6, 10)
        bank.storage, bank.host_rows = "pinned", bank.pseudo_logits.view_as(bank.pseudo_logits)  # as on a GPU
        return bank

    @pytest.mark.parametrize("kind", ["mapped", "pinned"])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
    def test_have_rows_of_their_own_on_the_device(self, duplicate, kind, tmp_path):
        bank = self.make(kind, tmp_path)
        before = bank.pseudo_logits.clone()
        copied = duplicate(bank)
        assert (copied.storage, copied.host_rows) == ("device", None)
        assert "MiB on cpu" in repr(copied)
        assert copied.to(dtype=torch.bfloat16).dtype == torch.bfloat16
        copied.to(dtype=torch.float32)
        d2_step(torch.randn(6, 10), torch.arange(6), copied)
        assert not torch.equal(copied.pseudo_logits, before)
        assert torch.equal(bank.pseudo_logits, before)
        assert bank.storage != "device"
        assert (bank.host_rows is None) == (kind == "mapped")

    @pytest.mark.parametrize("kind", ["mapped", "pinned"])
    def test_that_share_the_rows_are_where_these_are(self, kind, tmp_path):
        bank = self.make(kind, tmp_path)
        shared = copy.copy(bank)
        assert shared.pseudo_logits is bank.pseudo_logits
        assert (shared.storage, shared.host_rows) == (bank.storage, bank.host_rows)


class TestMemoryMapped:
    def test_steps_like_one_in_memory_and_keeps_its_contents(self, backend, tmp_path):
        if torch.get_default_device().type != "cpu":
            pytest.skip("a bank in a file lives on the CPU")
        options = {"samples": 30, "classes": 70}
        mapped, plain = make_bank(**options, storage=tmp_path / "bank"), make_bank(**options)
        assert (tmp_path / "bank").stat().st_size == mapped.nbytes
        logits = torch.randn(30, 70)
        for bank in (mapped, plain):
            d2_step(logits, torch.arange(30), bank, backend=backend)
        assert torch.equal(mapped.pseudo_logits, plain.pseudo_logits)
        labels = mapped.hard_labels().where(mapped.slots < 0, -1)
        del mapped
        reopened = PseudoLabelBank(labels, 70, storage=tmp_path / "bank")
        assert torch.equal(reopened.pseudo_logits, plain.pseudo_logits)

    def test_a_file_of_another_size_is_refused_and_left_alone(self, tmp_path):
        (tmp_path / "bank").write_bytes(b"precious")
        with pytest.raises(BankError, match=r"has 8 bytes, but 3 rows x 3 classes of torch.float32 take 36"):
            PseudoLabelBank(LABELS, 3, storage=tmp_path / "bank")
        assert (tmp_path / "bank").read_bytes() == b"precious"

    def test_a_path_that_cannot_be_written_is_named(self, tmp_path):
        with pytest.raises(BankError, match=r"nowhere/bank of 36 bytes: No such file"):
            PseudoLabelBank(LABELS, 3, storage=tmp_path / "nowhere" / "bank")
        (tmp_path / "file").touch()
        with pytest.raises(BankError, match=r"file/bank of 36 bytes: Not a directory"):
            PseudoLabelBank(LABELS, 3, storage=tmp_path / "file" / "bank")

    def test_a_full_disk_is_an_error_when_the_bank_is_made(self, tmp_path):
        """Not a SIGBUS in the middle of training."""
        code = (
            "import resource, signal, torch, sys; from r2d2fast import PseudoLabelBank;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
            "PseudoLabelBank(torch.full((1000,), -1), 100, storage=sys.argv[1])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "bank")], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert "cannot make the bank file" in result.stderr
        assert "free space or choose another path" in result.stderr
        assert not (tmp_path / "bank").exists()

    def test_stays_where_it_is(self, tmp_path):
        bank = PseudoLabelBank(LABELS, 3, storage=tmp_path / "bank")
        with pytest.raises(BankError, match="storage='device'"):
            bank.to(dtype=torch.float16)
        with pytest.raises(ValueError, match="lives on the CPU"):
            PseudoLabelBank(LABELS, 3, storage=tmp_path / "bank", device="meta")

    def test_takes_no_memory_but_the_pages_it_touches(self, tmp_path):
        code = (
            "import resource, torch, sys; from r2d2fast import PseudoLabelBank, d2_step;"
            "bank = PseudoLabelBank(torch.full((300_000,), -1), 1000, storage=sys.argv[1]);"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "d2_step(torch.randn(256, 1000), torch.randint(0, 300_000, (256,)), bank);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "bank")], capture_output=True, text=True, check=True
        )
        os.remove(tmp_path / "bank")
        assert int(result.stdout) < 200 * 1024  # KiB, for a bank of 1200 MB
