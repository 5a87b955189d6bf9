"""What the CUDA sources do where something is wrong, so that a bad row harms nothing else, and with scalars on the device."""

import mmap
from unittest import mock

import pytest
import torch
from torch import Tensor

from r2d2fast import BackendError, BankError, d2_step, reference
from r2d2fast._backends import cuda
from r2d2fast.bank import DTYPES
from r2d2fast.options import CLASS_LOSSES, StepOptions
from r2d2fast.reference import Bank
from r2d2fast.testing import compare, expect
from tests.cases import slow_but
from tests.cuda_host import backend
from tests.cuda_host.backend import on_the_host
from tests.cuda_host.host import Host
from tests.test_cuda import make

F32, BF16, F16 = DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


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
            assert cuda_host.left_behind() == (0, 0), "the error was returned, not left for PyTorch to find"
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
        assert host.left_behind() == (0, 0), "device current afterwards"
        assert [report.device for report in reports] == [0, 0, 0, 3, 3, 3], "device"
        assert [report.stream for report in reports] == [0, 0, 0, 0x50, 0x50, 0x50], "stream"
        before = bank.pseudo_logits.clone()
        with (
            mock.patch.object(cuda, "_target", return_value=(8, 0)),
            pytest.raises(BackendError, match=r"launched: cudaErrorInvalidDevice \(.+\);"),
        ):
            run()
        assert torch.equal(bank.pseudo_logits, before)
        assert host.left_behind() == (0, 0), "device current afterwards"


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


class TestDeviceScalars:
    """A captured graph replays with what the tensors hold by then."""

    @pytest.mark.parametrize("class_loss", CLASS_LOSSES)
    @pytest.mark.parametrize("classes", slow_but([10, 100, 1000, 1025, 8193], [100, 8193]))
    def test_give_the_same_bits_as_numbers(self, cuda_host: Host, order: str, classes: int, class_loss: str) -> None:
        numbers = run_with(cuda_host, order, classes, class_loss)
        assert not torch.equal(numbers[2], numbers[3]), "update"
        tensors = {name: torch.tensor(value) for name, value in VALUES.items()}
        for values in (tensors, {"beta": tensors["beta"]}):
            for ours, expected in zip(run_with(cuda_host, order, classes, class_loss, **values), numbers, strict=True):
                assert torch.equal(ours, expected), "not the same bits"
        plain = run_with(cuda_host, order, classes, class_loss, grad_scale=1.0)
        assert torch.equal(plain[2], numbers[2]), "grad_scale changes the update"
        assert torch.allclose(plain[1] * 48, numbers[1], rtol=1e-5, atol=1e-8), "grad_scale"

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", VALUES)
    @pytest.mark.parametrize("classes", slow_but([10, 1000, 1025, 8193], [10, 8193]))
    def test_one_that_is_not_finite_touches_no_row(self, cuda_host: Host, classes: int, name: str, bad: float) -> None:
        loss, grad, rows, before = run_with(cuda_host, "permuted", classes, "kl_reverse", **{name: torch.tensor(bad)})
        assert torch.equal(rows, before), "bank"
        assert loss.isnan(), "loss"
        assert grad.isnan().all(), "gradient"


def check_bad_index(host: Host, order: str, classes: int, bad: int | str, dtype: torch.dtype = torch.int64) -> None:
    """On a GPU nothing waits for the kernel, so that it goes on; labelled samples, duplicates and all others come out right."""
    logits, index, bank = make("duplicates", classes, (F32, F32))
    wrong = torch.tensor([1, 3])
    good = ~torch.isin(torch.arange(len(index)), wrong)
    index[wrong] = len(bank) if bad == "size" else bad
    step = {"label_lr": 40.0, "normalizer": 4.0}
    expected = expect(logits[good], index[good], bank, **step)
    with on_the_host(host, order) as reports:
        loss, grad = d2_step(logits, index.to(dtype), bank, backend="cuda", **step)
        assert bank.status.tolist() == [0, 1], "status"
        assert loss.isnan(), "loss"
        assert grad[wrong].isnan().all(), "gradient of the bad rows"
        compare(expected, expected.loss, grad[good], bank)
        owned = bank.slots[index[good].unique()]
        written = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.int32)
        written[owned[owned >= 0].long()] = 1
        assert (reports[0].writes("pseudo_logits") == written).all(), "writes of the bank"
        assert (reports[0].reads("logits")[wrong] == 0).all(), "reads of the bad rows"
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
    """A bad row harms nothing else."""

    @pytest.mark.parametrize(
        "bad", slow_but([-1, "size", 2**31 - 1, -(2**31), 2**33 + 1, -(2**62)], ["size", 2**33 + 1])
    )
    @pytest.mark.parametrize("classes", slow_but([10, 100, 1000, 1025, 8193], [10, 1000, 8193]))
    def test_an_index_out_of_range(self, cuda_host: Host, order: str, classes: int, bad: int | str) -> None:
        check_bad_index(cuda_host, order, classes, bad)
        if bad == "size" or -(2**31) <= bad < 2**31:
            check_bad_index(cuda_host, order, classes, bad, torch.int32)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("classes", slow_but([10, 100, 1001, 3000], [10, 1001]))
    def test_predictions_that_are_not_finite(self, cuda_host: Host, order: str, classes: int, bad: float) -> None:
        logits, index, bank = make("padded", classes, (F32, BF16))
        index[(index == 1) | (index == 2)] = 4
        index[2] = 1  # unlabelled, as are 2 and 4
        index[-1] = 2
        logits[2, classes - 1] = logits[-1, 0] = bad
        before, slots = bank.pseudo_logits.clone(), bank.slots[index].long()
        with on_the_host(cuda_host, order) as reports:
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

    @pytest.mark.parametrize("where", ["logits", "bank"])
    @pytest.mark.parametrize("classes", slow_but([10, 33, 129, 1000, 1025, 8193], [33, 1025, 8193]))
    def test_a_row_that_is_not_finite_is_not_written(
        self, cuda_host: Host, order: str, classes: int, where: str
    ) -> None:
        logits, index, bank = make("alike", classes, (F32, F32))
        (logits if where == "logits" else bank.pseudo_logits)[1, classes // 2] = float("nan")
        before = bank.pseudo_logits[1].clone()
        with on_the_host(cuda_host, order) as reports:
            loss, grad = d2_step(logits, index, bank, backend="cuda")
        assert loss.isnan(), "loss"
        assert (grad.isnan().all(1) == (index == 1)).all(), "gradient"
        assert torch.equal(bank.pseudo_logits[1].nan_to_num(), before.nan_to_num()), "bank"
        writes = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.int32)
        writes[index] = 1
        writes[1] = 0
        assert (reports[0].writes("pseudo_logits") == writes).all(), "writes of the bank"
        assert bank.status.tolist() == [0, 0], "status"


def _two_sided(elements: int) -> Tensor:
    """bfloat16 zeros whose memory goes as far to the front: where an offset of 32 bits wraps, there is memory, too."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on
    size = 2 * elements * 2
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip(f"this machine gives out no {size / 2**30:.0f} GiB of addresses")
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=elements, offset=elements * 2)


def test_offsets_and_random_counters_are_64_bits(cuda_host: Host) -> None:
    """Logits and a bank of more than 2^31 elements, of which a few pages are ever made."""
    classes = 8192
    samples = 2**31 // classes + 3
    rows = _two_sided(samples * classes).view(samples, classes)
    logits = _two_sided(2**31 + 2 * classes).as_strided((2, classes), (2**31 + classes, 1)).normal_()
    index = torch.tensor([5, samples - 1])
    before = rows[index].normal_()
    rows[index] = before
    parts = (torch.arange(samples).int(), torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    bank = Bank(rows, *parts, 10.0, "stochastic", 3)
    with mock.patch.object(backend, "WATCHED_ELEMENTS", 0), on_the_host(cuda_host, "forward"):
        loss, _ = cuda.step(logits, index, bank, StepOptions(0.1, 0.03, 40.0, 1.0, "kl_reverse", 1.0, 1.0, True), None)
    ours = rows[index]
    rows[index] = before
    bank.updates.zero_()
    exact = reference.d2_step(logits, index, bank, label_lr=40.0, normalizer=1.0)
    torch.testing.assert_close(loss.double(), exact.loss)
    assert (ours != rows[index]).float().mean() < 0.004, "bank rounded or written otherwise"
