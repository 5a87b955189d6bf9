"""What the CUDA sources do where something is wrong, and scalars on the device (DESIGN.md, section 3, rules 6 and 7)."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from r2d2fast import BackendError, BankError, d2_step, reference
from r2d2fast._backends import cuda
from r2d2fast.bank import DTYPES
from r2d2fast.options import CLASS_LOSSES, StepOptions
from r2d2fast.testing import compare, expect
from tests.cuda_host.backend import on_the_host
from tests.cuda_host.host import ORDERS, Host
from tests.test_cuda import make

F32, BF16, F16 = DTYPES


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # as in test_cuda.py


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


class TestFailingLaunches:
    MESSAGE = (
        r"could not be launched: cudaErrorLaunchOutOfResources \(.+\); `python -m r2d2fast.doctor` checks this device"
    )

    @pytest.mark.parametrize("call", ["step", "predict", "scale"])
    def test_is_a_backend_error_and_leaves_everything_as_it_was(self, cuda_host: Host, order: str, call: str) -> None:
        logits, index, bank = make("different", 100, (F32, F32))
        before, grad = bank.pseudo_logits.clone(), torch.ones(10)

        def run() -> object:
            if call == "step":
                return d2_step(logits, index, bank, backend="cuda")
            if call == "predict":
                return bank.predict_(index, logits, "cuda")
            return cuda.scale_gradient(grad, torch.tensor(3.0), 1.0, False)

        what = {"step": "D2 step", "predict": "prediction", "scale": "gradient"}[call]
        with on_the_host(cuda_host, order) as reports:
            cuda_host.fail_next_launch(701)
            with pytest.raises(BackendError, match=f"the {what} kernel {self.MESSAGE}"):
                run()
            assert torch.equal(bank.pseudo_logits, before)
            assert (bank.updates.item(), *bank.status.tolist()) == (0, 0, 0)
            assert (grad == 1).all()
            run()
        assert len(reports) == 2
        assert not torch.equal(bank.pseudo_logits, before) or call == "scale"
        assert (grad == 3).all() or call != "scale"


def check_target(host: Host, order: str) -> None:
    """Kernels run on the device and the stream they are told, and where there is no such device, not at all."""
    logits, index, bank = make("different", 100, (F32, F32))

    def run() -> None:
        d2_step(logits, index, bank, backend="cuda")
        bank.predict_(index, logits, "cuda")
        cuda.scale_gradient(logits[:1], torch.tensor(2.0), 1.0, False)

    with on_the_host(host, order) as reports:
        run()
        with mock.patch.object(cuda, "_target", return_value=(3, 0x50)):
            run()
        assert [report.device for report in reports] == [0, 0, 0, 3, 3, 3], "device"
        assert [report.stream for report in reports] == [0, 0, 0, 0x50, 0x50, 0x50], "stream"
        before = bank.pseudo_logits.clone()
        with (
            mock.patch.object(cuda, "_target", return_value=(8, 0)),
            pytest.raises(BackendError, match=r"launched: cudaErrorInvalidDevice \(.+\);"),
        ):
            run()
        assert torch.equal(bank.pseudo_logits, before)


def test_the_device_and_stream_of_a_launch(cuda_host: Host, order: str) -> None:
    check_target(cuda_host, order)


VALUES: dict[str, float | Tensor] = {"alpha": 0.3, "beta": 0.07, "label_lr": 123.0, "grad_scale": 48.0}


def run_with(host: Host, order: str, classes: int, class_loss: str, **values: float | Tensor) -> tuple[Tensor, ...]:
    """(loss, grad, rows, rows before) of one step; not by d2_step(), which looks into tensors that are on the CPU."""
    torch.manual_seed(0)
    logits, index, bank = make("different", classes, (F32, F32))
    before = bank.pseudo_logits.clone()
    step = StepOptions(**{**VALUES, **values}, class_loss=class_loss, normalizer=4.0, update_normalizer=3.0)
    with on_the_host(host, order) as reports:
        loss, grad = cuda.step(logits, index, bank, step, None)
    assert [report.launches for report in reports] == [1], "launches"
    assert bank.status.tolist() == [0, 0], "status"
    return loss, grad, bank.pseudo_logits, before


def check_same_bits(host: Host, order: str, classes: int, class_loss: str) -> None:
    numbers = run_with(host, order, classes, class_loss)
    assert not torch.equal(numbers[2], numbers[3]), "update"
    tensors = {name: torch.tensor(value) for name, value in VALUES.items()}
    for values in (tensors, {"beta": tensors["beta"]}):
        for ours, expected in zip(run_with(host, order, classes, class_loss, **values), numbers, strict=True):
            assert torch.equal(ours, expected), "not the same bits"
    plain = run_with(host, order, classes, class_loss, grad_scale=1.0)
    assert torch.equal(plain[2], numbers[2]), "grad_scale changes the update"
    assert torch.allclose(plain[1] * 48, numbers[1], rtol=1e-5, atol=1e-8), "grad_scale"


def check_bad_scalar(host: Host, order: str, classes: int, name: str, bad: float) -> None:
    loss, grad, rows, before = run_with(host, order, classes, "kl_reverse", **{name: torch.tensor(bad)})
    assert torch.equal(rows, before), "bank"
    assert loss.isnan(), "loss"
    assert grad.isnan().all(), "gradient"


class TestDeviceScalars:
    """A captured graph replays with what the tensors hold by then."""

    @pytest.mark.parametrize("class_loss", CLASS_LOSSES)
    @pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 8193])
    def test_give_the_same_bits_as_numbers(self, cuda_host: Host, order: str, classes: int, class_loss: str) -> None:
        check_same_bits(cuda_host, order, classes, class_loss)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", VALUES)
    @pytest.mark.parametrize("classes", [10, 1000, 1025, 8193])
    def test_one_that_is_not_finite_touches_no_row(self, cuda_host: Host, classes: int, name: str, bad: float) -> None:
        check_bad_scalar(cuda_host, "permuted", classes, name, bad)


def check_bad_index(host: Host, order: str, classes: int, bad: int | str, dtype: torch.dtype = torch.int64) -> None:
    """On a GPU nothing waits for the kernel, so that it goes on; labelled samples, duplicates and all others come out right."""
    logits, index, bank = make("duplicates", classes, (F32, F32))
    good = torch.arange(len(index)) != 3
    index[3] = len(bank) if bad == "size" else bad
    step = {"label_lr": 40.0, "normalizer": 4.0}
    expected = expect(logits[good], index[good], bank, **step)
    with on_the_host(host, order) as reports:
        loss, grad = d2_step(logits, index.to(dtype), bank, backend="cuda", **step)
        assert bank.status.tolist() == [0, 1], "status"
        assert loss.isnan(), "loss"
        assert grad[3].isnan().all(), "gradient of the bad row"
        compare(expected, expected.loss, grad[good], bank)
        owned = bank.slots[index[good].unique()]
        written = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.int32)
        written[owned[owned >= 0].long()] = 1
        assert (reports[0].writes("pseudo_logits") == written).all(), "writes of the bank"
        assert (reports[0].reads("logits")[3] == 0).all(), "reads of the bad row"
        # The problem stays when a later step has none, until the bank is loaded anew.
        d2_step(logits[good], index[good].to(dtype), bank, backend="cuda", **step)
        assert bank.status.tolist() == [0, 1], "status"
        with pytest.raises(BankError, match=r"met an index outside \[0, M\) since"):
            bank.check()
        bank.load_state_dict(bank.state_dict())
        bank.check()
        bank.predict_(index.to(dtype), logits, "cuda")
        assert bank.status.tolist() == [0, 1], "status"
        with pytest.raises(BankError, match=r"met an index outside \[0, M\) since"):
            bank.check()


class TestBadInputs:
    """Rule 6, as it is on this backend."""

    @pytest.mark.parametrize("bad", [-1, "size", 2**31 - 1, -(2**31), 2**33 + 1, -(2**62)])
    @pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 8193])
    def test_an_index_out_of_range(self, cuda_host: Host, order: str, classes: int, bad: int | str) -> None:
        check_bad_index(cuda_host, order, classes, bad)
        if bad == "size" or -(2**31) <= bad < 2**31:
            check_bad_index(cuda_host, order, classes, bad, torch.int32)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("classes", [10, 100, 1001, 3000])
    def test_predictions_that_are_not_finite(self, cuda_host: Host, order: str, classes: int, bad: float) -> None:
        check_bad_predictions(cuda_host, order, classes, bad)

    @pytest.mark.parametrize("where", ["logits", "bank"])
    @pytest.mark.parametrize("classes", [10, 33, 129, 1000, 1025, 8193])
    def test_a_row_that_is_not_finite_is_not_written(
        self, cuda_host: Host, order: str, classes: int, where: str
    ) -> None:
        check_bad_row(cuda_host, order, classes, where)


def check_bad_row(host: Host, order: str, classes: int, where: str, class_loss: str = "kl_reverse") -> None:
    logits, index, bank = make("alike", classes, (F32, F32))
    (logits if where == "logits" else bank.pseudo_logits)[1, classes // 2] = float("nan")
    before = bank.pseudo_logits[1].clone()
    with on_the_host(host, order) as reports:
        loss, grad = d2_step(logits, index, bank, class_loss=class_loss, backend="cuda")
    assert loss.isnan(), "loss"
    assert (grad.isnan().all(1) == (index == 1)).all(), "gradient"
    assert torch.equal(bank.pseudo_logits[1].nan_to_num(), before.nan_to_num()), "bank"
    writes = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.int32)
    writes[index] = 1
    writes[1] = 0
    assert (reports[0].writes("pseudo_logits") == writes).all(), "writes of the bank"
    assert bank.status.tolist() == [0, 0], "status"


def check_bad_predictions(host: Host, order: str, classes: int, bad: float) -> None:
    logits, index, bank = make("padded", classes, (F32, BF16))
    index[2] = 1  # unlabelled, as is 2
    index[-1] = 2
    logits[2, classes - 1] = logits[-1, 0] = bad
    before, slots = bank.pseudo_logits.clone(), bank.slots[index].long()
    with on_the_host(host, order) as reports:
        bank.predict_(index, logits, "cuda")
        assert bank.status.tolist() == [0, 2], "status"
        good = (slots >= 0) & reference.last_occurrence(slots) & logits.isfinite().all(1)
        before[slots[good]] = logits[good].bfloat16()
        assert torch.equal(bank.pseudo_logits, before)
        d2_step(logits.nan_to_num(), index, bank, backend="cuda")
        assert bank.status.tolist() == [0, 2], "status"
        with pytest.raises(BankError, match=r"met predictions that are not finite since"):
            bank.check()
        index[0] = -1
        d2_step(logits, index, bank, backend="cuda")
    assert bank.status.tolist() == [0, 3], "status"
    assert [report.launches for report in reports] == [1, 1, 1]
    with pytest.raises(BankError, match=r"an index outside \[0, M\) and predictions that are not finite"):
        bank.check()
    bank.load_state_dict(bank.state_dict())
    bank.check()
