"""FusedD2Loss and d2_step as a user meets them."""

import logging
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

import r2d2fast
from r2d2fast import BackendError, BankError, FusedD2Loss, d2_loss, d2_step, reference
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

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"alpha": "0.1"}, TypeError, "alpha is '0.1', of type str; pass a number"),
            ({"label_lr": None}, TypeError, "label_lr is None, of type NoneType"),
            ({"update_normalizer": "8"}, TypeError, "update_normalizer is '8', of type str"),
            ({"normalizer": torch.tensor(8.0)}, TypeError, r"normalizer is tensor\(8.\), of type Tensor"),
            ({"label_lr": -1.0}, ValueError, "label_lr is -1.0; it must not be negative"),
            ({"reduction": "avg"}, ValueError, "reduction is 'avg'; accepted: mean, sum, none"),
            ({"reduction": "sum", "normalizer": 2.0}, ValueError, "normalizer=2.0 is what reduction='mean' divides by"),
        ],
    )
    def test_numbers_and_names_are_checked_on_every_way_in(self, options, error, message):
        bank = make_bank(4, 5)
        before = bank.pseudo_logits.clone()
        batch = torch.zeros(1, 5), torch.tensor([1])
        for call in (
            lambda: FusedD2Loss(bank, **options),
            lambda: d2_step(*batch, bank, **options),
            lambda: d2_loss(*batch, bank, **options),
            lambda: d2_loss(*batch, bank, sample_weight=torch.ones(1), **options),
        ):
            with pytest.raises(error, match=message):
                call()
        assert torch.equal(bank.pseudo_logits, before)

    def test_what_is_no_tensor_and_no_bank_is_named(self):
        bank, logits, index = make_bank(4, 5), torch.zeros(2, 5), torch.arange(2)
        for call in (lambda *batch: d2_step(*batch, bank), lambda *batch: FusedD2Loss(bank)(*batch)):
            with pytest.raises(TypeError, match=r"index is a ndarray; pass a tensor.*torch.as_tensor\(index\)"):
                call(logits, index.numpy())
            with pytest.raises(TypeError, match="logits are a list; pass the network's output"):
                call(logits.tolist(), index)
        for make in (FusedD2Loss, lambda tensor: d2_step(logits, index, tensor)):
            with pytest.raises(TypeError, match="bank is a Tensor; pass a PseudoLabelBank, made from the labels"):
                make(torch.full((4,), -1))

    def test_the_functions_warn_of_alpha_not_above_beta(self):
        for function in (d2_step, d2_loss):
            with pytest.warns(UserWarning, match="alpha=0.02 <= beta=0.03: by Theorem 1"):
                function(torch.zeros(1, 5), torch.tensor([1]), make_bank(4, 5), alpha=0.02)

    @pytest.mark.parametrize(
        ("weight", "error", "message"),
        [
            ([1.0, 2.0], TypeError, "sample_weight is list; pass a floating-point tensor"),
            (torch.ones(2, dtype=torch.int64), TypeError, "sample_weight is torch.int64"),
            (torch.ones(3), ValueError, r"sample_weight is \[3\] on cpu; pass \[2\] on cpu, one weight a row"),
            (torch.ones(2, device="meta"), ValueError, r"sample_weight is \[2\] on meta; pass \[2\] on cpu"),
        ],
    )
    def test_weights_that_do_not_fit_are_named(self, weight, error, message):
        bank = make_bank(4, 5)
        before = bank.pseudo_logits.clone()
        with pytest.raises(error, match=message):
            FusedD2Loss(bank)(torch.zeros(2, 5), torch.arange(2), sample_weight=weight)
        assert torch.equal(bank.pseudo_logits, before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be 1, 2"),
            ({"gradient_accumulation_steps": 2.0}, "gradient_accumulation_steps is 2.0"),
            ({"gradient_accumulation_steps": 2, "update_normalizer": 8.0}, "both say how far pseudo-labels move"),
        ],
    )
    def test_accumulation_is_said_once(self, options, message):
        with pytest.raises(ValueError, match=message):
            FusedD2Loss(make_bank(4, 5), **options)


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


class TestReduction:
    """And weights of samples, through autograd."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_take_a_gradient_each(self, backend, dtype):
        logits, index, upstream = torch.randn(6, 20).to(dtype), torch.arange(6), torch.randn(6)
        bank = make_bank(6, 20)
        rows, grad = d2_step(logits, index, bank, reduction="none", update=False, backend=backend)
        leaf = logits.clone().requires_grad_()
        losses = FusedD2Loss(bank, reduction="none", backend=backend)(leaf, index, grad_scale=4.0)
        assert torch.equal(losses, rows)
        losses.backward(upstream)
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad, (grad.float() * upstream[:, None]).to(dtype))

    @pytest.mark.parametrize("normalizer", [None, 3.0])
    def test_weights_count_in_loss_and_gradient_and_not_in_the_bank(self, normalizer):
        logits, index, weight = torch.randn(6, 20), torch.arange(6), torch.tensor([0.0, 1, 2, 3, 0.5, 1])
        banks = [make_bank(6, 20) for _ in range(3)]
        leaf = logits.clone().requires_grad_()
        criterion = FusedD2Loss(banks[0], normalizer=normalizer, statistics=True)
        loss = criterion(leaf, index, sample_weight=weight)
        loss.backward()
        rows, grad = d2_step(logits, index, banks[1], reduction="none", update=False)
        divisor = normalizer or 6
        torch.testing.assert_close(loss, (rows * weight).sum() / divisor)
        torch.testing.assert_close(leaf.grad, grad * weight[:, None] / divisor)
        FusedD2Loss(banks[2], normalizer=normalizer)(logits, index)
        assert torch.equal(banks[0].pseudo_logits, banks[2].pseudo_logits)
        assert criterion.read_statistics()["rows"] == 4

    def test_weights_of_one_change_nothing(self):
        logits, index = torch.randn(6, 20), torch.arange(6)
        for reduction in ("mean", "sum", "none"):
            criterion = FusedD2Loss(make_bank(6, 20), reduction=reduction).eval()
            torch.testing.assert_close(
                criterion(logits, index, sample_weight=torch.ones(6)), criterion(logits, index), rtol=1e-6, atol=0
            )

    @pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16)])
    @pytest.mark.parametrize(("rows", "normalizer"), [(1, 512.0), (512, None)])
    def test_weights_leave_a_scaled_float16_gradient_its_range(self, rows, normalizer, scale):
        """Before its division by D the gradient of a row so far from its pseudo-label would be infinite in float16."""
        bank = make_bank(rows, 3, labelled_every=0)
        bank.pseudo_logits.copy_(torch.tensor([70.0, 0.0, 0.0]))
        grads = []
        for weight in (None, torch.ones(rows), torch.full((rows,), 0.5)):
            logits = torch.tensor([[0.0, 1.0, 0.0]]).repeat(rows, 1).half().requires_grad_()
            criterion = FusedD2Loss(bank, normalizer=normalizer).eval()
            loss = criterion(logits, torch.arange(rows), grad_scale=scale, sample_weight=weight)
            (loss * scale).backward()
            grads.append(logits.grad)
        assert grads[0].isfinite().all()
        torch.testing.assert_close(grads[1], grads[0])
        torch.testing.assert_close(grads[2], grads[0] / 2)


def test_the_functional_form_is_the_module():
    logits, index, weight = torch.randn(6, 20), torch.arange(6), torch.rand(6)
    options = {"alpha": 0.2, "label_lr": 70.0, "reduction": "sum"}
    banks = make_bank(6, 20), make_bank(6, 20)
    leaves = [logits.clone().requires_grad_() for _ in banks]
    losses = (
        FusedD2Loss(banks[0], **options)(leaves[0], index, sample_weight=weight),
        d2_loss(leaves[1], index, banks[1], sample_weight=weight, **options),
    )
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)
    with torch.no_grad():
        d2_loss(logits, index, banks[1], **options)
    d2_loss(leaves[1], index, banks[1], update=False, **options)
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)


def test_micro_batches_move_bank_and_weights_as_one_batch():
    x, index = torch.randn(12, 5), torch.randperm(12)
    outcomes = []
    for steps in (1, 4):
        torch.manual_seed(0)
        network, bank = torch.nn.Linear(5, 20), make_bank(12, 20)
        criterion = FusedD2Loss(bank, label_lr=100.0, gradient_accumulation_steps=steps)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        before = bank.pseudo_logits.clone()
        for inputs, numbers in zip(x.chunk(steps), index.chunk(steps), strict=True):
            (criterion(network(inputs), numbers) / steps).backward()
        optimizer.step()
        assert not torch.equal(bank.pseudo_logits, before)
        outcomes.append((bank.pseudo_logits, network.weight.detach()))
    for one, accumulated in zip(*outcomes, strict=True):
        torch.testing.assert_close(accumulated, one)


class Model(torch.nn.Module):
    """One that holds its criterion, as a LightningModule does."""

    def __init__(self, classes=20, **options):
        super().__init__()
        self.network = torch.nn.Linear(5, classes)
        bank = make_bank(8, classes, **{name: options.pop(name) for name in ("dtype", "storage") if name in options})
        self.criterion = FusedD2Loss(bank, **options)

    def step(self):
        self.criterion(self.network(torch.randn(8, 5)), torch.arange(8)).backward()


class TestInAModel:
    def test_moves_bank_statistics_and_scalars(self):
        model = Model(statistics=True, alpha=torch.tensor(0.1))
        model.to("meta")
        criterion = model.criterion
        tensors = (criterion.bank.pseudo_logits, criterion.bank.slots, criterion.statistics, criterion.alpha)
        assert {tensor.device.type for tensor in tensors} == {"meta"}

    @pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
    def test_casts_leave_the_bank_s_dtype(self, cast):
        model = Model(statistics=True)
        before = model.criterion.bank.pseudo_logits.clone()
        cast(model)
        assert model.network.weight.dtype != torch.float32
        assert torch.equal(model.criterion.bank.pseudo_logits, before)
        assert model.criterion.bank.dtype == torch.float32

    def test_a_mapped_bank_says_why_it_stays(self, tmp_path):
        model = Model(storage=tmp_path / "bank")
        with pytest.warns(
            UserWarning, match=r"the bank stays on cpu, in the file .*/bank, .* to meta; .*storage='device'"
        ):
            model.to("meta")
        assert model.criterion.bank.device.type == "cpu"
        assert model.network.weight.device.type == "meta"

    def test_checkpoints_carry_bank_and_statistics(self, tmp_path):
        saved, loaded = Model(statistics=True), Model(statistics=True)
        saved.step()
        torch.save(saved.state_dict(), tmp_path / "model.pt")
        loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert torch.equal(loaded.criterion.bank.pseudo_logits, saved.criterion.bank.pseudo_logits)
        assert loaded.criterion.bank.updates == 1
        assert loaded.criterion.read_statistics() == saved.criterion.read_statistics()
        assert len(list(saved.parameters())) == 2
        assert not list(saved.buffers())

    def test_of_another_bank_are_refused(self):
        with pytest.raises(BankError, match="rows are"):
            Model(classes=21).load_state_dict(
                Model().state_dict() | Model(classes=21).network.state_dict(prefix="network.")
            )

    def test_without_the_bank(self, tmp_path):
        """Of gigabytes: what is saved instead is an empty tensor, so that safetensors takes it, too."""
        model, other = Model(persistent=False), Model(persistent=False)
        assert {name: value.numel() for name, value in model.state_dict().items()}["criterion._extra_state"] == 0
        model.step()
        other.load_state_dict(model.state_dict())
        other.load_state_dict(Model().state_dict())
        assert other.criterion.bank.updates == 0
        with pytest.raises(BankError, match=r"persistent=False, without the bank.*bank.load_state_dict"):
            Model().load_state_dict(model.state_dict())

    def test_distributed_checkpoints_see_tensors(self, tmp_path):
        saved, loaded = Model(), Model()
        saved.step()
        dcp.save({"model": saved.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
        metadata = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
        entry = metadata["model.criterion._extra_state.bank.pseudo_logits"]
        assert entry.size == saved.criterion.bank.pseudo_logits.shape
        state = {"model": loaded.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        loaded.load_state_dict(state["model"])
        assert torch.equal(loaded.criterion.bank.pseudo_logits, saved.criterion.bank.pseudo_logits)
        assert loaded.criterion.bank.updates == 1

    def test_averages_share_the_bank(self):
        model = Model(statistics=True)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
        copied = average.module.criterion
        assert copied.bank is model.criterion.bank
        assert copied is not model.criterion
        assert copied.statistics is not model.criterion.statistics
        model.step()
        average.update_parameters(model)
        assert torch.equal(average.module.network.weight, model.network.weight)


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
