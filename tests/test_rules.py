"""The rules about what happens and when: a class of tests for each. With ``-m gpu`` the same on the device."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from r2d2fast import BankError, FusedD2Loss, PseudoLabelBank, d2_step
from r2d2fast.bank import DTYPES
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import check_step, compare, expect, make_bank
from tests.cases import slow_but
from tests.sizes import NARROW_AND_WIDE


def digest(tensor):
    return tensor.cpu().numpy().tobytes()


@NARROW_AND_WIDE
class TestReadBeforeWrite:
    """Read before write."""

    def test_loss_and_gradient_do_not_see_the_update(self, backend, classes):
        logits = torch.randn(8, classes)
        updated = d2_step(logits, torch.arange(8), make_bank(8, classes), label_lr=1e4, backend=backend)
        untouched = d2_step(logits, torch.arange(8), make_bank(8, classes), label_lr=1e4, update=False, backend=backend)
        assert torch.equal(updated[0], untouched[0])
        assert torch.equal(updated[1], untouched[1])


@NARROW_AND_WIDE
class TestLabelledSamples:
    """Labelled samples own no row."""

    def test_own_no_memory(self, backend, classes):
        assert make_bank(9, classes, labelled_every=3).nbytes == 6 * classes * 4

    def test_touch_no_row(self, backend, classes):
        bank = make_bank(9, classes, labelled_every=3)
        before = bank.pseudo_logits.clone()
        labelled = torch.tensor([0, 3, 6])
        d2_step(torch.randn(3, classes), labelled, bank, label_lr=1e4, backend=backend)
        bank.predict_(labelled, torch.randn(3, classes), backend)
        assert torch.equal(bank.pseudo_logits, before)

    def test_pull_towards_the_label(self, backend, classes):
        bank = make_bank(9, classes, labelled_every=3)
        labelled = torch.tensor([0, 3, 6])
        _, grad = d2_step(torch.zeros(3, classes), labelled, bank, backend=backend)
        assert torch.equal(grad.argmin(1), bank.hard_labels()[labelled])


@NARROW_AND_WIDE
class TestDuplicates:
    """Duplicates: the last occurrence wins."""

    def test_read_the_old_row_and_the_last_wins(self, backend, classes):
        index = torch.tensor([1, 2, 1, 4, 1, 2, 0, 0])  # 0 is labelled
        logits = torch.randn(8, classes)
        bank, alone = make_bank(6, classes), make_bank(6, classes)
        options = {"label_lr": 500.0, "normalizer": 8.0}
        check_step(backend, logits, index, bank, **options)
        winners = torch.tensor([3, 4, 5])
        d2_step(logits[winners], index[winners], alone, backend=backend, **options)
        # Not the same bits on a GPU, where alignment decides how a row is shared out. Another winner would be off by 1 or more.
        torch.testing.assert_close(bank.pseudo_logits, alone.pseudo_logits, atol=2e-5, rtol=1e-6)

    def test_are_bitwise_the_same_every_time_and_with_any_threads(self, backend, classes, threads):
        # So many rows that the C++ kernel gives work to more than two threads, lanes being rows or classes.
        rows = 60_000 // classes * 10 if backend == "cpu" else 100
        index = torch.randint(0, 40, (rows,))
        logits = torch.randn(rows, classes)
        results = set()
        for count in (1, 2, 3, 1, 2) if backend == "cpu" else (1, 2):
            torch.set_num_threads(count)
            bank = make_bank(40, classes)
            loss, grad = d2_step(logits, index, bank, label_lr=500.0, backend=backend)
            results.add((loss.item(), digest(grad), digest(bank.pseudo_logits)))
        assert len(results) == 1


class TestDeterminism:
    """Determinism."""

    @pytest.mark.parametrize(("rows", "classes"), [(6001, 10), (1001, 64), (601, 100), (77, 1000)])
    @pytest.mark.parametrize("class_loss", CLASS_LOSSES)
    def test_any_number_of_threads_gives_the_same_bits(self, backend, rows, classes, class_loss, threads):
        counts = (1, 2, 3, 7)
        if backend == "cpu":
            assert rows * classes > 3 * 16384  # each thread of the C++ kernel gets at least that
        else:  # has no threads of a CPU: the same bits on every run
            rows, counts = rows // 20, (1, 2)
        index = torch.randperm(rows + 100)[:rows]
        logits = torch.randn(rows, classes, requires_grad=True)
        results = set()
        for count in counts:
            torch.set_num_threads(count)
            bank = make_bank(rows + 100, classes)
            criterion = FusedD2Loss(bank, class_loss=class_loss, statistics=True, backend=backend)
            loss = criterion(logits, index)
            (grad,) = torch.autograd.grad(loss, logits)
            statistics = tuple(criterion.read_statistics().values())
            results.add((loss.item(), digest(grad), digest(bank.pseudo_logits), statistics))
        assert len(results) == 1


@NARROW_AND_WIDE
class TestBadRows:
    """A bad row harms nothing else."""

    @pytest.mark.parametrize("class_loss", CLASS_LOSSES)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_non_finite_logit_harms_nothing_else(self, backend, classes, bad, class_loss):
        for position in (0, classes - 1):
            logits = torch.randn(20, classes)
            spoilt = logits.clone()
            spoilt[7, position] = bad
            bank, clean = make_bank(20, classes, labelled_every=0), make_bank(20, classes, labelled_every=0)
            before = bank.pseudo_logits.clone()
            options = {"label_lr": 500.0, "class_loss": class_loss, "backend": backend}
            loss, grad = d2_step(spoilt, torch.arange(20), bank, **options)
            _, clean_grad = d2_step(logits, torch.arange(20), clean, **options)
            others = torch.arange(20) != 7
            assert loss.isnan()
            assert grad[7].isnan().all()
            assert torch.equal(grad[others], clean_grad[others])
            assert torch.equal(bank.pseudo_logits[others], clean.pseudo_logits[others])
            assert torch.equal(bank.pseudo_logits[7], before[7])

    @pytest.mark.parametrize("bad", [-1, 20, 2**40, -(2**40)])
    def test_an_index_out_of_range_stops_before_anything_is_written(self, backend, classes, bad):
        if backend in ("cuda", "triton"):
            pytest.skip("a GPU goes on: see the next test")
        bank = make_bank(20, classes)
        before, steps = bank.pseudo_logits.clone(), bank.updates.clone()
        index = torch.tensor([1, 2, bad, 4])
        with pytest.raises(IndexError, match=rf"index\[2\] is {bad}.*0 … 19"):
            d2_step(torch.randn(4, classes), index, bank, backend=backend)
        with pytest.raises(IndexError, match=rf"index\[2\] is {bad}"):
            bank.predict_(index, torch.randn(4, classes), backend)
        assert torch.equal(bank.pseudo_logits, before)
        assert torch.equal(bank.updates, steps)

    @pytest.mark.parametrize("bad", [-1, 20, 2**40, -(2**40)])
    def test_an_index_out_of_range_on_a_gpu_harms_nothing_else_and_is_remembered(self, backend, classes, bad):
        if backend not in ("cuda", "triton"):
            pytest.skip("on a CPU it is an IndexError: see the test before")
        bank, clean = make_bank(20, classes), make_bank(20, classes)
        logits, good = torch.randn(4, classes), torch.tensor([0, 1, 3])
        index = torch.tensor([1, 2, bad, 4])
        options = {"label_lr": 500.0, "normalizer": 4.0}
        expected = expect(logits[good], index[good], bank, **options)
        loss, grad = d2_step(logits, index, bank, backend=backend, **options)
        d2_step(logits[good], index[good], clean, **options)
        assert loss.isnan()
        assert grad[2].isnan().all()
        compare(expected, expected.loss, grad[good], bank)
        with pytest.raises(BankError, match=r"met an index outside \[0, M\) since it was made"):
            bank.check()
        bank.load_state_dict(clean.state_dict())
        bank.check()
        bank.predict_(index, logits, backend)
        clean.predict_(index[good], logits[good])
        assert torch.equal(bank.pseudo_logits, clean.pseudo_logits)
        with pytest.raises(BankError, match="met an index"):
            bank.check()


class TestNoSync:
    """No host sync, as far as a CPU can show it: no Python call in forward or backward asks a tensor for its value."""

    def test_forward_and_backward_read_no_scalar(self, monkeypatch):
        def refuse(*_):
            raise AssertionError("a tensor was read back on the host")

        bank = make_bank(8, 10)
        criterion = FusedD2Loss(bank, statistics=True)
        logits = torch.randn(8, 10, requires_grad=True)
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        criterion(logits, torch.arange(8)).backward()


@NARROW_AND_WIDE
class TestUpstreamGradient:
    """The update never depends on the upstream gradient."""

    def loss_grad_bank(self, backend, classes, after):
        bank = make_bank(8, classes)
        logits = torch.linspace(-2, 2, 8 * classes).view(8, classes).requires_grad_()
        loss = FusedD2Loss(bank, label_lr=500.0, backend=backend)(logits, torch.arange(8))
        after(loss)
        return logits.grad, bank.pseudo_logits

    def test_scales_the_gradient_and_not_the_update(self, backend, classes):
        plain = self.loss_grad_bank(backend, classes, lambda loss: loss.backward())
        scaled = self.loss_grad_bank(backend, classes, lambda loss: (loss * 1024.0).backward())
        zero = self.loss_grad_bank(backend, classes, lambda loss: (loss * 0.0).backward())
        assert torch.equal(scaled[0], plain[0] * 1024.0)
        assert torch.equal(zero[0], plain[0] * 0.0)
        assert torch.equal(scaled[1], plain[1])
        assert torch.equal(zero[1], plain[1])

    def test_a_second_backward_leaves_bank_and_gradient_right(self, backend, classes):
        def twice(loss):
            (3.0 * loss).backward(retain_graph=True)
            loss.backward()

        plain = self.loss_grad_bank(backend, classes, lambda loss: loss.backward())
        both = self.loss_grad_bank(backend, classes, twice)
        torch.testing.assert_close(both[0], 4.0 * plain[0])
        assert torch.equal(both[1], plain[1])

    def test_a_grad_scaler_changes_nothing(self, backend, classes):
        """float16: the scale goes into the forward kernel and comes back out in backward."""
        index = torch.arange(8)
        logits = torch.randn(8, classes).half()
        results = []
        for scale in (1.0, 2.0**14):
            bank, leaf = make_bank(8, classes), logits.clone().requires_grad_()
            loss = FusedD2Loss(bank, label_lr=500.0, backend=backend)(leaf, index, grad_scale=scale)
            (loss * scale).backward()
            results.append((leaf.grad.float() / scale, bank.pseudo_logits))
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-7, rtol=2e-3)
        assert torch.equal(results[0][1], results[1][1])

    def test_double_backward_is_refused(self, backend, classes):
        logits = torch.randn(4, classes, requires_grad=True)
        loss = FusedD2Loss(make_bank(8, classes), backend=backend)(logits, torch.arange(4))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, logits, create_graph=True)


def test_an_upstream_gradient_of_one_costs_no_pass():
    """The update never depends on the upstream gradient, and the C++ backend then hands on the very memory that forward wrote."""
    logits = torch.randn(8, 100, requires_grad=True)
    loss = FusedD2Loss(make_bank(8, 100), backend="cpu")(logits, torch.arange(8))
    saved = loss.grad_fn.saved_tensors[0]
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == saved.data_ptr()


@NARROW_AND_WIDE
class TestExactlyOnce:
    """The update happens exactly once."""

    def test_in_training_with_gradients(self, backend, classes):
        bank = make_bank(8, classes)
        before = bank.pseudo_logits.clone()
        once = make_bank(8, classes)
        d2_step(torch.zeros(8, classes), torch.arange(8), once, backend=backend)
        logits = torch.zeros(8, classes, requires_grad=True)
        loss = FusedD2Loss(bank, backend=backend)(logits, torch.arange(8))
        assert not torch.equal(bank.pseudo_logits, before)
        assert torch.equal(bank.pseudo_logits, once.pseudo_logits)
        assert int(bank.updates) == 1
        loss.backward()
        assert torch.equal(bank.pseudo_logits, once.pseudo_logits)

    @pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
    def test_not_otherwise(self, backend, classes, how):
        bank = make_bank(8, classes)
        before = bank.pseudo_logits.clone()
        criterion = FusedD2Loss(bank, backend=backend)
        expected = d2_step(torch.ones(8, classes), torch.arange(8), bank, update=False, backend=backend)[0]
        if how == "eval":
            loss = criterion.eval()(torch.ones(8, classes), torch.arange(8))
        else:
            with getattr(torch, how)():
                loss = criterion(torch.ones(8, classes), torch.arange(8))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(bank.pseudo_logits, before)
        assert int(bank.updates) == 0


class TestSixteenBitBanks:
    """Types."""

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_steps_below_the_resolution_add_up_without_bias(self, backend, dtype):
        rows, steps = {"cuda": (40, 25), "triton": (40, 12)}.get(backend, (200, 100))
        logits = torch.zeros(rows, 10)
        logits[:, 0] = 2.0
        drift = {}
        for rounding, bank_dtype in (("nearest", dtype), ("stochastic", dtype), ("nearest", torch.float32)):
            bank = make_bank(rows, 10, labelled_every=0, dtype=bank_dtype, rounding=rounding)
            bank.pseudo_logits.fill_(8.0)
            for _ in range(steps):
                # One step moves ỹ by about 3e-3; the spacing at 8 is 0.0625 (bfloat16) and 0.0078 (float16).
                d2_step(logits, torch.arange(rows), bank, label_lr=0.06, normalizer=1.0, backend=backend)
            drift[rounding, bank_dtype] = float(bank.pseudo_logits[:, 0].double().mean()) - 8.0
        exact = drift["nearest", torch.float32]
        assert drift["nearest", dtype] == 0.0
        # So many rows of random walks: the standard deviation of their mean is at most this.
        spread = 8 * torch.finfo(dtype).eps * (exact / (8 * torch.finfo(dtype).eps) / rows) ** 0.5
        assert exact > 3 * spread, "no drift at all would pass, too"
        assert abs(drift["stochastic", dtype] - exact) < 3 * spread

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("classes", slow_but([10, 100], {10}))
    def test_stochastic_rounding_is_the_definition_s(self, backend, classes, dtype):
        """Same seed, update and element: the same bits, but where float32 arithmetic differs in its last place."""
        options = {"dtype": dtype, "rounding": "stochastic", "scale": 0.01}
        bank = make_bank(64, classes, seed=2**40 + 7, **options)
        for _ in range(3):
            logits, before = torch.randn(64, classes), bank.pseudo_logits.clone()
            check_step(backend, logits, torch.arange(64), bank, label_lr=5.0)
        other = make_bank(64, classes, seed=8, **options)
        other.pseudo_logits.copy_(before)
        other.updates.fill_(2)
        d2_step(logits, torch.arange(64), other, label_lr=5.0, backend=backend)
        assert (other.pseudo_logits != bank.pseudo_logits).float().mean() > 0.1


class TestSaturation:
    """Numerics, and what a bank of any dtype does at the end of its range."""

    @pytest.mark.parametrize(
        ("rounding", "dtype"), [("nearest", torch.float32), *itertools.product(["nearest", "stochastic"], DTYPES[1:])]
    )
    @pytest.mark.parametrize("classes", [4, 16, 100])
    def test_a_step_saturates(self, backend, classes, rounding, dtype):
        bank = make_bank(2, classes, labelled_every=0, dtype=dtype, rounding=rounding)
        largest = torch.finfo(dtype).max
        bank.pseudo_logits.fill_(largest)
        logits = torch.zeros(2, classes)
        logits[:, 0] = 50.0  # ỹ of this class goes up, beyond the range, and all others go down
        d2_step(
            logits, torch.arange(2), bank, label_lr=largest / 30, alpha=1.0, beta=0.0, normalizer=1.0, backend=backend
        )
        assert (bank.pseudo_logits[:, 0] == largest).all()
        assert bank.pseudo_logits.isfinite().all()


class TestBeyondTwoToThe31Elements:
    """Shapes."""

    def test_offsets_are_64_bits(self, backend, tmp_path):
        classes, samples = 262_144, 8200
        assert samples * classes > 2**31
        storage = "device"
        if torch.get_default_device().type == "cpu":
            # A file with a hole, of which only the pages of one row take space.
            storage = tmp_path / "bank"
            with open(storage, "wb") as file:
                file.truncate(2 * samples * classes)
        elif torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("less than 6 GiB of GPU memory are free")
        bank = PseudoLabelBank(torch.full((samples,), -1), classes, dtype=torch.bfloat16, storage=storage)
        small = PseudoLabelBank(torch.full((1,), -1), classes, dtype=torch.bfloat16)
        logits = torch.randn(1, classes)
        for target, sample in ((bank, samples - 1), (small, 0)):
            index = torch.tensor([sample])
            target.predict_(index, logits, backend)
            loss, _ = d2_step(logits * 0.5, index, target, label_lr=1e5, backend=backend)
        assert torch.equal(bank.pseudo_logits[-1], small.pseudo_logits[0])
        assert not torch.equal(small.pseudo_logits[0], logits[0].bfloat16())
        assert not bank.pseudo_logits[-2].any()
        assert loss.isfinite()


def test_two_processes_agree(tmp_path):
    """Determinism across runs."""
    code = (
        "import torch, hashlib; from r2d2fast import d2_step; from r2d2fast.testing import make_bank; torch.manual_seed(3);"
        "bank = make_bank(500, 100); loss, grad = d2_step(torch.randn(400, 100), torch.randint(0, 500, (400,)), bank);"
        "print(loss.item(), hashlib.sha256(grad.numpy().tobytes() + bank.pseudo_logits.numpy().tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": str(n)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in (1, 2)
    }
    assert len(outputs) == 1
