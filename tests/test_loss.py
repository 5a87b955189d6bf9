"""FusedD2Loss and d2_step as a user meets them."""

import logging
import warnings

import pytest
import torch

import r2d2fast
from r2d2fast import BackendError, FusedD2Loss, d2_step, reference
from r2d2fast._backends import native
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import make_bank


def test_module_and_function_are_one(backend):
    banks = make_bank(8, 20), make_bank(8, 20)
    logits = torch.randn(8, 20, requires_grad=True)
    options = {
        "alpha": 0.2,
        "beta": 0.05,
        "label_lr": 70.0,
        "class_loss": "kl",
        "normalizer": 3.0,
        "update_normalizer": 5.0,
    }
    loss = FusedD2Loss(banks[0], **options, backend=backend)(logits, torch.arange(8))
    loss.backward()
    expected, grad = d2_step(logits, torch.arange(8), banks[1], **options, backend=backend)
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(logits.grad, grad)
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)
    assert not grad.requires_grad


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_gradcheck_in_float64(class_loss):
    """PyTorch citizen: with the update off, by the reference, which takes float64."""
    criterion = FusedD2Loss(make_bank(6, 7), class_loss=class_loss).eval()
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: criterion(x, torch.tensor([0, 1, 5, 4])), (logits,))


def test_upstream_gradients_without_memory(backend):
    """Batches of them (vmap over backward), and the symbolic zero."""
    logits = torch.randn(4, 10, requires_grad=True)
    loss = FusedD2Loss(make_bank(8, 10), backend=backend)(logits, torch.arange(4))
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    scales = torch.tensor([1.0, 2.0, -3.0])
    (batched,) = torch.autograd.grad(loss, logits, scales, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, scales[:, None, None] * plain)
    (zero,) = torch.autograd.grad(loss, logits, torch._efficientzerotensor((), device=loss.device))
    assert not zero.any()


def test_autocast_hands_on_16_bit_logits():
    network = torch.nn.Linear(5, 20)
    bank = make_bank(8, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.randn(8, 5))
        loss = FusedD2Loss(bank)(logits, torch.arange(8))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert network.weight.grad.isfinite().all()


def test_learning_recovers_labels():
    """A linear network on separable data: pseudo-labels initialised wrongly are talked round by the labelled samples."""
    centres = torch.eye(3) * 4
    classes = torch.arange(90) % 3
    x = centres[classes] + torch.randn(90, 3) * 0.3
    labels = classes.clone()
    labels[9:] = -1
    bank = r2d2fast.PseudoLabelBank(labels, 3)
    network = torch.nn.Linear(3, 3)
    bank.predict_(torch.arange(90), network(x))
    criterion = FusedD2Loss(bank, label_lr=700.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    assert (bank.hard_labels() == classes).float().mean() < 0.9
    for _ in range(200):
        optimizer.zero_grad()
        criterion(network(x), torch.arange(90)).backward()
        optimizer.step()
    assert (bank.hard_labels() == classes).all()


def test_the_bank_is_no_parameter_and_no_buffer():
    criterion = FusedD2Loss(make_bank(8, 20), statistics=True)
    assert not list(criterion.parameters())
    assert not list(criterion.buffers())
    assert not criterion.state_dict()


class TestStatistics:
    def test_are_means_over_the_unlabelled_rows(self, backend):
        for classes in (20, 100):
            bank = make_bank(9, classes, scale=1.0)
            criterion = FusedD2Loss(bank, label_lr=0.0, statistics=True, backend=backend)
            index = torch.arange(9)
            batches = [torch.randn(9, classes) for _ in range(3)]
            batches[1][4, 0] = float("nan")
            for logits in batches:
                criterion(logits, index)
            read = criterion.read_statistics()

            unlabelled = bank.slots >= 0
            log_q = bank.logits(index).double().log_softmax(1)
            rows = []
            for number, logits in enumerate(batches):
                log_p = logits.double().log_softmax(1)
                counted = unlabelled & ((index != 4) if number == 1 else True)
                rows.append(
                    torch.stack(
                        [
                            reference.class_loss_rows(log_p, log_q, "kl_reverse"),
                            -(log_p.exp() * log_p).sum(1),
                            log_p.exp().amax(1),
                            log_q.exp().amax(1),
                            (log_p.argmax(1) == log_q.argmax(1)).double(),
                        ]
                    )[:, counted]
                )
            expected = torch.cat(rows, dim=1).mean(1).tolist()
            names = ("class_loss", "entropy", "prediction_confidence", "pseudo_confidence", "agreement")
            assert [read[name] for name in names] == pytest.approx(expected, rel=1e-5)
            assert read["rows"] == 17
            assert read["skipped"] == 1

    def test_start_anew_when_read_and_do_not_change_the_step(self, backend):
        with_statistics, without = make_bank(9, 70), make_bank(9, 70)
        criterion = FusedD2Loss(with_statistics, statistics=True, backend=backend)
        logits = torch.randn(9, 70)
        loss = criterion(logits, torch.arange(9))
        assert torch.equal(loss, FusedD2Loss(without, backend=backend)(logits, torch.arange(9)))
        assert torch.equal(with_statistics.pseudo_logits, without.pseudo_logits)
        assert criterion.read_statistics()["rows"] == 6
        assert criterion.read_statistics()["rows"] == 0

    def test_move_with_the_bank(self):
        """A kernel is given their address: on another device it would write into memory that is not theirs."""
        criterion = FusedD2Loss(make_bank(9, 20), statistics=True)
        criterion(torch.randn(9, 20), torch.arange(9))
        assert criterion.statistics is criterion.statistics
        assert criterion.statistics[0] == 6
        criterion.bank.to("meta")
        assert criterion.statistics.device == criterion.bank.device == torch.device("meta")

    def test_must_be_asked_for(self):
        with pytest.raises(RuntimeError, match="statistics=True"):
            FusedD2Loss(make_bank(9, 20)).read_statistics()


class TestBadUse:
    def test_alpha_not_above_beta_warns_with_the_theorem(self):
        with pytest.warns(UserWarning, match=r"alpha=0.03 <= beta=0.1: by Theorem 1.*p̂\^\(1 - beta/alpha\)"):
            FusedD2Loss(make_bank(4, 5), alpha=0.03, beta=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FusedD2Loss(make_bank(4, 5), alpha=0.1, beta=0.03)

    @pytest.mark.parametrize("call", ["module", "function", "predict_"])
    @pytest.mark.parametrize(
        ("logits", "index", "error", "message"),
        [
            (
                torch.zeros(3, 7),
                torch.arange(3),
                ValueError,
                r"logits are \[3, 7\], but this bank has 5 classes: pass \[B, 5\]",
            ),
            (torch.zeros(5), torch.arange(5), ValueError, r"logits are \[5\]"),
            (
                torch.zeros(3, 5, dtype=torch.int64),
                torch.arange(3),
                TypeError,
                r"logits are torch.int64.*before any softmax",
            ),
            (torch.zeros(3, 5), torch.arange(3).float(), TypeError, r"index is torch.float32; pass int64 or int32"),
            (torch.zeros(3, 5), torch.tensor([True] * 3), TypeError, r"index is torch.bool"),
            (torch.zeros(3, 5), torch.arange(4), ValueError, r"index is \[4\] for 3 rows of logits"),
            (torch.zeros(3, 5), torch.arange(3)[:, None], ValueError, r"index is \[3, 1\]"),
            (
                torch.zeros(3, 5),
                torch.arange(3, device="meta"),
                ValueError,
                r"index on meta, the bank on cpu.*bank.to\(device\)",
            ),
            (torch.zeros(3, 5, device="meta"), torch.arange(3), ValueError, r"logits are on meta"),
        ],
    )
    def test_what_does_not_fit_is_named(self, call, logits, index, error, message):
        bank = make_bank(8, 5)
        before = bank.pseudo_logits.clone()
        calls = {
            "module": lambda: FusedD2Loss(bank)(logits, index),
            "function": lambda: d2_step(logits, index, bank),
            "predict_": lambda: bank.predict_(index, logits),
        }
        with pytest.raises(error, match=message):
            calls[call]()
        assert torch.equal(bank.pseudo_logits, before)

    def test_an_unknown_class_loss_is_named_when_the_loss_is_made(self):
        for make in (
            lambda b: FusedD2Loss(b, class_loss="l1"),
            lambda b: d2_step(torch.zeros(1, 5), torch.tensor([0]), b, class_loss="l1"),
        ):
            with pytest.raises(ValueError, match="class_loss is 'l1'; accepted: kl_reverse, kl, mse"):
                make(make_bank(4, 5))

    @pytest.mark.parametrize("name", ["normalizer", "update_normalizer", "grad_scale"])
    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
    def test_a_divisor_must_be_positive_and_finite(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be positive and finite"):
            d2_step(torch.zeros(1, 5), torch.tensor([0]), make_bank(4, 5), **{name: value})

    @pytest.mark.parametrize("name", ["alpha", "beta", "label_lr"])
    def test_a_weight_must_be_finite(self, name):
        """It would overwrite the batch's rows with NaN; set on a module, too, by a schedule that went wrong."""
        criterion = FusedD2Loss(make_bank(4, 5))
        setattr(criterion, name, float("nan"))
        before = criterion.bank.pseudo_logits.clone()
        for call in (
            lambda: criterion(torch.zeros(1, 5), torch.tensor([1])),
            lambda: FusedD2Loss(make_bank(4, 5), **{name: float("inf")}),
        ):
            with pytest.raises(ValueError, match=f"{name} is (nan|inf).*; they must be finite"):
                call()
        assert torch.equal(criterion.bank.pseudo_logits, before)

    def test_torch_func_is_refused_clearly(self):
        criterion = FusedD2Loss(make_bank(8, 5))
        with pytest.raises(RuntimeError, match=r"torch.func transforms.*r2d2fast.d2_step"):
            torch.func.grad(lambda x: criterion(x, torch.arange(8)))(torch.zeros(8, 5))


class TestBackends:
    def test_lists_each_with_a_reason(self):
        found = r2d2fast.backends()
        assert list(found) == ["reference", "cpu", "cuda", "triton"]
        assert found["reference"].available
        assert found["cpu"].available == (native.cpu.module is not None)
        assert all(status.detail for status in found.values())

    @pytest.mark.parametrize(
        ("backend", "dtype", "message"),
        [
            ("cuda", torch.float32, "backend 'cuda' cannot be used: "),
            ("triton", torch.float64, "backend 'triton' cannot be used: "),
            ("cpu", torch.float64, "backend 'cpu' cannot be used: .*float64"),
            ("gpu", torch.float32, "backend is 'gpu'; accepted: auto, reference, cpu, cuda, triton"),
        ],
    )
    def test_one_asked_for_by_name_is_used_or_refused(self, backend, dtype, message):
        with pytest.raises(BackendError, match=message):
            d2_step(torch.zeros(1, 5, dtype=dtype), torch.tensor([0]), make_bank(4, 5), backend=backend)

    def test_auto_says_once_that_it_chose_a_slower_one(self, caplog, monkeypatch):
        monkeypatch.setattr("r2d2fast._backends._said", set())
        with caplog.at_level(logging.WARNING, logger="r2d2fast"):
            for _ in range(3):
                d2_step(torch.zeros(1, 5, dtype=torch.float64), torch.tensor([0]), make_bank(4, 5))
                d2_step(torch.zeros(1, 5), torch.tensor([0]), make_bank(4, 5))
        assert [record.message for record in caplog.records] == [
            "using the slow reference backend: the kernels take float32, bfloat16 and float16; the logits are torch.float64"
        ]


def test_a_step_without_autograd_is_forward_and_backward(backend):
    """The same loss, gradient, update and statistics as through autograd; in eval mode, too, the bank is only read."""
    logits, index = torch.randn(6, 10), torch.arange(6)
    banks = [make_bank(8, 10) for _ in range(2)]
    losses = [FusedD2Loss(bank, label_lr=40.0, statistics=True, backend=backend) for bank in banks]
    leaf = logits.clone().requires_grad_()
    expected = losses[0](leaf, index)
    expected.backward()
    loss, grad = losses[1].step(logits, index, grad_scale=4.0)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, 4 * leaf.grad)
    assert not loss.requires_grad
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)
    assert losses[0].read_statistics() == losses[1].read_statistics()
    before = banks[1].pseudo_logits.clone()
    losses[1].eval().step(logits, index)
    assert torch.equal(banks[1].pseudo_logits, before)
