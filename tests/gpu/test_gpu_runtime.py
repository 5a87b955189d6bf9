"""What only a device can show: races, kernels, memory, no waiting, streams, CUDA graphs, pinned banks."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from r2d2fast import FusedD2Loss, d2_step
from r2d2fast._backends import choose
from r2d2fast.bank import DTYPES
from r2d2fast.doctor.speed import count_kernels
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import make_bank

pytestmark = pytest.mark.gpu


@contextmanager
def no_sync() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_against_waiting_works(device):
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=device).item()


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (3000, 100), (1000, 1000), (100, 21_841)])
@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_equal_steps_give_equal_bits(backend, device, rows, classes, class_loss):
    """Duplicates and determinism: a race would show in some of 20 runs over a batch full of duplicates."""
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


def test_statistics_move_with_the_bank(backend, device):
    criterion = FusedD2Loss(make_bank(9, 20, device="cpu"), statistics=True)
    for place in ("cpu", device):
        criterion.bank.to(place)
        criterion(torch.randn(9, 20, device=place), torch.arange(9, device=place))
        criterion.backend = backend
    assert criterion.read_statistics()["rows"] == 12


@pytest.mark.parametrize("classes", [10, 1000, 50_257])
@pytest.mark.parametrize("tensors", [False, True])
def test_the_host_never_waits(backend, device, classes, tensors):
    """No host sync."""
    bank = make_bank(30, classes, device=device)
    values = torch.tensor([0.1, 0.03, 40.0], device=device) if tensors else (0.1, 0.03, 40.0)
    criterion = FusedD2Loss(bank, *values, statistics=True, backend=backend)
    logits, index = torch.randn(20, classes, device=device, requires_grad=True), torch.arange(20, device=device)
    scale = torch.tensor(2.0, device=device) if tensors else 2.0
    for guard in (torch.enable_grad, no_sync):  # the first round loads and compiles
        with guard():
            criterion(logits, index, grad_scale=scale).backward(retain_graph=True)
            (criterion(logits, index, grad_scale=scale) * 3.0).backward()
            bank.predict_(index, logits, backend)
            d2_step(logits.detach(), index, bank, backend=backend)
            with torch.no_grad():
                criterion(logits, index)
    bank.check()


@pytest.mark.parametrize("classes", [10, 100, 1000, 5000, 50_257])
class TestOneKernel:
    """One pass."""

    def count(self, call, device):
        call()
        kernels, _, note = count_kernels(call, device)
        if kernels is None:
            pytest.skip(note)
        return kernels, note

    def test_for_a_step(self, backend, device, classes):
        bank = make_bank(60, classes, device=device)
        logits, index = torch.randn(40, classes, device=device), torch.randint(0, 60, (40,), device=device)
        kernels, names = self.count(lambda: d2_step(logits, index, bank, backend=backend), device)
        assert kernels == 1, names

    def test_for_a_step_with_statistics(self, backend, device, classes):
        criterion = FusedD2Loss(make_bank(60, classes, device=device), statistics=True, backend=backend)
        logits = torch.randn(40, classes, device=device, requires_grad=True)
        index = torch.arange(40, device=device)
        kernels, names = self.count(lambda: criterion(logits, index), device)
        assert kernels == 1, names

    def test_for_a_prediction(self, backend, device, classes):
        bank = make_bank(60, classes, device=device)
        logits, index = torch.randn(40, classes, device=device), torch.arange(40, device=device)
        kernels, names = self.count(lambda: bank.predict_(index, logits, backend), device)
        assert kernels == 1, names

    def test_and_a_tiny_one_for_backward(self, backend, device, classes):
        criterion = FusedD2Loss(make_bank(60, classes, device=device), backend=backend)
        logits, index = torch.randn(40, classes, device=device, requires_grad=True), torch.arange(40, device=device)
        one = torch.ones((), device=device)
        kernels, names = self.count(lambda: torch.autograd.grad(criterion(logits, index), logits, one), device)
        assert kernels == 2, names


@pytest.mark.parametrize(("rows", "classes"), [(1_000_000, 10), (16_384, 1000), (1024, 21_841)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_the_batch_s_size(backend, device, rows, classes, dtype):
    """One pass: a step allocates the gradient and a few bytes a row, and backward nothing."""
    bank = make_bank(rows, classes, device=device)
    criterion = FusedD2Loss(bank, statistics=True, backend=backend)
    logits = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
    index, one = torch.arange(rows, device=device), torch.ones((), device=device)
    for _ in range(2):  # the first round loads and compiles
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.autograd.grad(criterion(logits, index), logits, one)
        used = torch.cuda.max_memory_allocated(device) - before
    # PyTorch's allocator counts up to 1 MiB more than it was asked for, three times.
    assert used <= logits.nbytes + 32 * rows + 3 * 2**20


class TestBackward:
    """The update never depends on the upstream gradient, whose factor is applied in backward."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_factor_of_one_hands_on_what_forward_wrote(self, backend, device, dtype):
        criterion = FusedD2Loss(make_bank(40, 1001, device=device), backend=backend)
        logits = torch.randn(40, 1001, device=device).to(dtype).requires_grad_()
        loss = criterion(logits, torch.arange(40, device=device))
        saved = loss.grad_fn.saved_tensors[0]
        before = saved.clone()
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.data_ptr() == saved.data_ptr()
        assert torch.equal(grad, before)

    def test_a_factor_of_one_costs_no_pass_over_memory(self, backend, device):
        grad = torch.randn(2**27, device=device).view(2**17, 2**10)  # 512 MiB: beyond any cache
        module = choose(backend, grad, grad)
        seconds = {}
        for factor in (1.0, 1.0, -1.0, -1.0):  # the last of each counts
            upstream = torch.tensor(factor, device=device)
            torch.cuda.synchronize(device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                module.scale_gradient(grad, upstream, 1.0, False)
            end.record()
            end.synchronize()
            seconds[factor] = begin.elapsed_time(end)
        assert seconds[1.0] < 0.5 * seconds[-1.0]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("classes", [10, 1001])
    def test_scales_by_what_comes_from_above(self, backend, device, classes, dtype):
        logits = torch.randn(40, classes, device=device).to(dtype).requires_grad_()
        index = torch.arange(40, device=device)

        def gradient(after, **options):
            bank = make_bank(40, classes, device=device)
            loss = FusedD2Loss(bank, label_lr=500.0, backend=backend)(logits, index, **options)
            (grad,) = torch.autograd.grad(after(loss), logits)
            return grad, bank.pseudo_logits

        plain, rows = gradient(lambda loss: loss)
        for factor in (4.0, 0.0, -0.5):
            grad, same_rows = gradient(lambda loss, factor=factor: loss * factor)
            torch.testing.assert_close(grad, plain * factor)
            assert torch.equal(same_rows, rows)
        for scale in (8.0, torch.tensor(8.0, device=device)):
            grad, same_rows = gradient(lambda loss: loss * 8.0, grad_scale=scale)
            torch.testing.assert_close(grad, plain * 8.0, rtol=2e-3, atol=1e-6)
            assert torch.equal(same_rows, rows)

    def test_a_second_one_finds_what_forward_saved(self, backend, device):
        bank = make_bank(40, 100, device=device)
        logits = torch.randn(40, 100, device=device, requires_grad=True)
        loss = FusedD2Loss(bank, backend=backend)(logits, torch.arange(40, device=device))
        rows = bank.pseudo_logits.clone()
        grads = [torch.autograd.grad(loss * factor, logits, retain_graph=True)[0] for factor in (3.0, 1.0, 3.0, 1.0)]
        assert torch.equal(grads[0], grads[2])
        assert torch.equal(grads[1], grads[3])
        torch.testing.assert_close(grads[0], grads[1] * 3.0)
        assert torch.equal(bank.pseudo_logits, rows)

    def test_of_a_loss_spread_over_a_batch(self, backend, device):
        """An upstream gradient that is the sum of many."""
        bank = make_bank(40, 100, device=device)
        logits = torch.randn(40, 100, device=device, requires_grad=True)
        index = torch.arange(40, device=device)
        (plain,) = torch.autograd.grad(FusedD2Loss(bank, backend=backend).eval()(logits, index), logits)
        loss = FusedD2Loss(bank, backend=backend).eval()(logits, index)
        (grad,) = torch.autograd.grad(loss.expand(5).sum(), logits)
        torch.testing.assert_close(grad, plain * 5.0)


class TestGraphs:
    """A captured step is replayed with the scalars, the batch and the step counter of that moment."""

    SCHEDULE = ((0.1, 0.03, 40.0, 1.0), (0.3, 0.05, 400.0, 16.0), (0.2, 0.01, 4.0, 2.0))

    def capture(self, device, run):
        """``run`` as a graph, warmed up on a stream of its own as PyTorch asks."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return graph, results

    @pytest.mark.parametrize("classes", [10, 1000, 50_257])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_replays_with_new_values(self, backend, device, classes, dtype):
        options = {"dtype": dtype, "rounding": "nearest" if dtype == torch.float32 else "stochastic", "device": device}
        captured, eager = make_bank(60, classes, **options), make_bank(60, classes, **options)
        alpha, beta, label_lr, scale = torch.tensor(self.SCHEDULE[0], device=device)
        criterion = FusedD2Loss(captured, alpha, beta, label_lr, statistics=True, backend=backend)
        logits = torch.zeros(40, classes, device=device, requires_grad=True)
        index = torch.zeros(40, dtype=torch.int64, device=device)

        def run():
            loss = criterion(logits, index, grad_scale=scale)
            return loss, *torch.autograd.grad(loss * 2.0, logits)

        graph, (loss, grad) = self.capture(device, run)
        captured.load_state_dict(eager.state_dict())
        for number, values in enumerate((*self.SCHEDULE, self.SCHEDULE[0])):
            for tensor, value in zip((alpha, beta, label_lr, scale), values, strict=True):
                tensor.fill_(value)
            with torch.no_grad():
                logits.normal_()
            index.copy_(torch.randint(0, 60, (40,)))
            graph.replay()
            expected = FusedD2Loss(eager, *values[:3], backend=backend)(logits, index)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(grad, *torch.autograd.grad(expected * 2.0, logits))
            assert int(captured.updates) == int(eager.updates) == number + 1
            if dtype == torch.float32:
                torch.testing.assert_close(captured.pseudo_logits, eager.pseudo_logits)
            else:
                assert (captured.pseudo_logits != eager.pseudo_logits).float().mean() < 0.005
            captured.pseudo_logits.copy_(eager.pseudo_logits)
        captured.check()

    def test_predictions_too(self, backend, device):
        bank = make_bank(60, 100, device=device)
        logits, index = torch.randn(40, 100, device=device), torch.arange(40, device=device)
        graph, _ = self.capture(device, lambda: bank.predict_(index, logits, backend))
        logits.normal_()
        graph.replay()
        expected = make_bank(60, 100, device=device)
        expected.predict_(index, logits, backend)
        assert torch.equal(bank.pseudo_logits, expected.pseudo_logits)


@pytest.mark.parametrize("classes", [10, 1000, 50_257])
def test_runs_on_the_current_stream(backend, device, classes):
    """Behind work that keeps the stream busy for long: a kernel elsewhere would see the inputs from before it."""
    banks = make_bank(60, classes, device=device), make_bank(60, classes, device=device)
    final, index = torch.randn(40, classes, device=device), torch.arange(40, device=device)
    expected = d2_step(final, index, banks[1], backend=backend)
    spare, logits = make_bank(60, classes, device=device), torch.zeros(40, classes, device=device)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        d2_step(final, index, spare, backend=backend)  # so that nothing is loaded, compiled or allocated below
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        logits.copy_(final)
        results = d2_step(logits, index, banks[0], backend=backend)
        assert not stream.query(), "the stream was not busy any more: this shows nothing"
    stream.synchronize()
    assert all(map(torch.equal, results, expected))
    assert torch.equal(banks[0].pseudo_logits, banks[1].pseudo_logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device_where_another_is_current(backend):
    results = []
    for number in (0, 1):
        other = torch.device("cuda", number)
        bank = make_bank(60, 1000, device=other)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(40, 1000, generator=generator).to(other).requires_grad_()
        with torch.cuda.device(0):
            loss = FusedD2Loss(bank, backend=backend)(logits, torch.arange(40, device=other))
            (loss * 2.0).backward()
            bank.predict_(torch.arange(40, 50, device=other), logits[:10], backend)
            assert torch.cuda.current_device() == 0
        results.append([tensor.detach().cpu() for tensor in (loss, logits.grad, bank.pseudo_logits)])
    torch.testing.assert_close(*results)


class TestPinnedBank:
    """Rows in host memory that the kernel reads and writes itself."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("classes", [10, 64, 1000, 1001, 50_257])
    def test_steps_like_one_on_the_device(self, backend, device, classes, dtype):
        options = {"dtype": dtype, "rounding": "nearest" if dtype == torch.float32 else "stochastic", "device": device}
        pinned, plain = make_bank(60, classes, storage="pinned", **options), make_bank(60, classes, **options)
        logits, index = torch.randn(40, classes, device=device), torch.randint(0, 60, (40,), device=device)
        for _ in range(2):
            results = [d2_step(logits, index, bank, label_lr=40.0, backend=backend) for bank in (pinned, plain)]
            assert all(map(torch.equal, *results))
            assert torch.equal(pinned.pseudo_logits, plain.pseudo_logits)
        for bank in (pinned, plain):
            bank.predict_(index, logits, backend)
        assert torch.equal(pinned.pseudo_logits, plain.pseudo_logits)
        pinned.check()

    def test_takes_no_memory_of_the_gpu(self, device):
        before = torch.cuda.memory_allocated(device)
        bank = make_bank(3000, 1000, storage="pinned", device=device)
        assert not bank.host_rows.is_cuda
        assert bank.host_rows.data_ptr() == bank.pseudo_logits.data_ptr()
        assert bank.pseudo_logits.is_cuda
        assert torch.cuda.memory_allocated(device) - before < bank.nbytes / 10

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_is_pinned_for_a_device_that_is_not_current(self, backend):
        other = torch.device("cuda", 1)
        before = torch.cuda.memory_allocated(other)
        with torch.cuda.device(0):
            bank = make_bank(3000, 1000, storage="pinned", device=other)
            assert torch.cuda.memory_allocated(other) - before < bank.nbytes / 10
            logits, index = torch.randn(40, 1000, device=other), torch.arange(40, device=other)
            plain = make_bank(3000, 1000, device=other)
            for target in (bank, plain):
                d2_step(logits, index, target, backend=backend)
        assert torch.equal(bank.pseudo_logits, plain.pseudo_logits)

    def test_survives_a_round_trip(self, backend, device):
        saved, loaded = (make_bank(60, 100, storage="pinned", device=device) for _ in range(2))
        d2_step(torch.randn(40, 100, device=device), torch.arange(40, device=device), saved, backend=backend)
        loaded.load_state_dict(saved.state_dict())
        assert torch.equal(saved.pseudo_logits, loaded.pseudo_logits)
        assert torch.equal(saved.hard_labels(), loaded.hard_labels())
