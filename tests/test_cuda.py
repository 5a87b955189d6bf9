"""What numbers do not show of the CUDA sources: launches, bytes, bounds, what a failure leaves behind.

The tests that every backend shares run these sources too; what is wrong in them on purpose is in test_cuda_bugs.py.
"""

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

from r2d2fast import BankError, FusedD2Loss, PseudoLabelBank, d2_step, reference, testing
from r2d2fast._backends import cuda
from r2d2fast.bank import DTYPES
from r2d2fast.options import CLASS_LOSSES, StepOptions
from r2d2fast.rounding import saturate
from r2d2fast.testing import make_bank
from tests.cases import slow_but
from tests.cuda_host import backend
from tests.cuda_host.backend import on_the_host
from tests.cuda_host.guard import guarded
from tests.cuda_host.host import ORDERS, Host, Report

# Either side of where a row takes more threads, or more elements a thread; 15, 63, 255, ... have room for an aligned row and not
# for one whose first vector begins before it.
CLASSES = (2, 10, 15, 16, 17, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 512)
CLASSES += (1000, 1001, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097, 8191, 8192, 8193, 20011)
# One of each kernel, and of each kind of head and tail.
EACH_KERNEL = (10, 17, 33, 65, 129, 257, 1000, 1025, 2049, 4097, 8193)
MOST_IN_REGISTERS = 8192

# What cuda.step() allocates, in the order in which the harness sees it after logits and index.
GRAD, LOSS, RESULTS = "allocation 2", "allocation 3", "allocation 4"
SCALED = "allocation 2"  # by cuda.scale_gradient()
BEYOND_ONE_ROUND = 2048 * 1024 + 300  # elements of a gradient that its blocks scale in two rounds

PAIRS = list(itertools.product(DTYPES, DTYPES))
F32, BF16, F16 = DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_for(width: int) -> int:
    """A batch of two blocks or more, the last of them not full."""
    threads = next((t for limit, t in ((16, 2), (32, 4), (64, 8), (128, 16), (1024, 32)) if width <= limit), 128)
    return 128 // threads + 4


def pad(bank: PseudoLabelBank) -> None:
    """Moves the rows to lines of 128 bytes of their own, as bank.pinned_rows() has them; what is between is no number."""
    rows = bank.pseudo_logits
    line = 128 // rows.itemsize
    pitch = -(-rows.shape[1] // line) * line
    memory = torch.full((rows.shape[0] * pitch + line,), float("nan"), dtype=rows.dtype)
    memory = memory[-memory.data_ptr() % 128 // rows.itemsize :][: rows.shape[0] * pitch]
    assert memory.data_ptr() % 128 == 0
    bank.pseudo_logits = memory.view(-1, pitch)[:, : rows.shape[1]].copy_(rows)


def make(
    layout: str, classes: int, dtypes: tuple[torch.dtype, torch.dtype], size: float = 3.0, rows: int = 0, **options
) -> tuple[Tensor, Tensor, PseudoLabelBank]:
    """Logits, index and a bank with rows that are not in the batch.

    "alike": logits, gradient and bank of a row are equally aligned. "different": no two of them are, and a third of the
    samples is labelled. "padded": each row of the bank on lines of its own. "shifted": rows of the bank begin an element
    further. "duplicates": samples that come up to four times, in one block and in several. "crowded": half of the batch is
    one sample.
    """
    rows = rows or rows_for(classes)
    labelled = 0 if layout == "alike" else 3
    bank = make_bank(rows + 6, classes, labelled_every=labelled, dtype=dtypes[1], label_scale=7.0, **options)
    index = torch.arange(rows) if layout == "alike" else torch.randperm(rows + 6)[:rows]
    if layout == "duplicates":
        index[[0, 1, rows // 2, -2]] = 1
        # The last is misaligned as its row of the bank is, and the one before it otherwise.
        index[[2, -1]] = (bank.slots == (rows - 1) % 8).nonzero()[0]
    logits = (torch.randn(rows, classes) * size).to(dtypes[0])
    if layout == "crowded":
        index[: rows // 2] = index[-1] = 1
    if layout == "different":
        logits = torch.zeros(rows, classes + 3, dtype=dtypes[0])[:, 1 : classes + 1].copy_(logits)
    if layout == "padded":
        pad(bank)
    if layout == "shifted":
        memory = torch.empty(bank.pseudo_logits.numel() + 1, dtype=dtypes[1])[1:]
        bank.pseudo_logits = memory.view_as(bank.pseudo_logits).copy_(bank.pseudo_logits)
    return logits, index, bank


def check_step(
    host: Host,
    order: str,
    classes: int,
    layout: str = "alike",
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    class_loss: str = "kl_reverse",
    update: bool = True,
    size: float = 3.0,
    rows: int = 0,
) -> None:
    """One launch, with the definition's numbers, that reads and writes what it must, once."""
    logits, index, bank = make(layout, classes, dtypes, size, rows)
    options = {
        "class_loss": class_loss,
        "label_lr": 40.0,
        "normalizer": 4.0,
        "update_normalizer": 3.0,
        "update": update,
    }
    with on_the_host(host, order) as reports:
        testing.check_step("cuda", logits, index, bank, **options)
    assert [report.launches for report in reports] == [1], "launches"
    assert bank.status.tolist() == [0, 0], "status"
    check_counts(reports[0], index, bank, class_loss, update)


def check_counts(report: Report, index: Tensor, bank: PseudoLabelBank, class_loss: str, update: bool) -> None:
    in_registers = bank.pseudo_logits.stride(0) <= MOST_IN_REGISTERS
    passes = 1 if in_registers else 3 if class_loss == "mse" else 2
    assert (report.reads("logits") == passes).all(), "reads of the logits"
    assert (report.reads(GRAD) == 0).all(), "reads of the gradient"
    assert (report.writes(GRAD) == 1).all(), "writes of the gradient"
    assert report.writes(LOSS).item() == 2, "writes of the loss: NaN, until all blocks have reported"
    assert (report.writes(RESULTS) == 1).all(), "writes of the row losses"
    assert (report.reads(RESULTS) == 1).all(), "reads of the row losses"
    assert report.writes("updates").item() == update, "writes of the counter"
    # Rows of samples outside the batch and of labelled ones stay at 0; the padding of a row written is written with it.
    owned, times = bank.slots[index.unique()], index.unique(return_counts=True)[1]
    reads = torch.zeros(len(bank.pseudo_logits), 1, dtype=torch.int32)
    # An update has the occurrences of a sample share the read; without one they are strangers to each other.
    each = torch.ones_like(times) if update and in_registers else times * passes
    reads[owned[owned >= 0].long(), 0] = each[owned >= 0].int()
    counted, classes = report.reads("pseudo_logits"), bank.num_classes
    assert (counted[:, :classes] == reads).all(), "reads of the bank"
    assert (counted[:, classes:] <= reads).all(), "reads of the bank's padding"
    assert (report.writes("pseudo_logits") == reads.clamp_max(int(update))).all(), "writes of the bank"


@pytest.mark.parametrize("layout", ["alike", "different", "padded"])
@pytest.mark.parametrize("classes", slow_but(CLASSES, EACH_KERNEL))
def test_a_step_is_one_launch_and_one_pass(cuda_host: Host, classes: int, layout: str) -> None:
    """Every pair of dtypes; loss and order go round, so that every regime sees every loss in every order and layout."""
    shift = CLASSES.index(classes)
    for k, dtypes in enumerate(PAIRS if classes < 2048 else PAIRS[shift % 2 :: 2]):
        check_step(cuda_host, ORDERS[(k + shift) % 3], classes, layout, dtypes, CLASS_LOSSES[(k // 3 + k + shift) % 3])


@pytest.mark.parametrize("classes", slow_but([10, 33, 129, 1000, 1025, 8193], [10, 8193]))
def test_without_an_update_the_bank_is_read_only(cuda_host: Host, order: str, classes: int) -> None:
    for layout in ("alike", "padded", "duplicates"):
        check_step(cuda_host, order, classes, layout, update=False)


@pytest.mark.parametrize("classes", slow_but([7, 10, 33, 129, 1001, 1025, 8193], [7, 1001, 8193]))
def test_duplicates_share_one_read_and_one_write(cuda_host: Host, order: str, classes: int) -> None:
    for dtypes, class_loss in zip(((F32, F32), (BF16, F16), (F16, F32)), CLASS_LOSSES, strict=True):
        check_step(cuda_host, order, classes, "duplicates", dtypes, class_loss)


@pytest.mark.parametrize(("classes", "rows"), [(2, 600), (65, 150), (1025, 300)])
def test_duplicates_far_apart(cuda_host: Host, order: str, classes: int, rows: int) -> None:
    """A thread looks through the index in several strides."""
    check_step(cuda_host, order, classes, "duplicates", rows=rows)


def test_more_duplicates_than_a_block_can_note(cuda_host: Host, order: str) -> None:
    check_step(cuda_host, order, 10, "crowded", rows=600)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_an_index_that_begins_anywhere(cuda_host: Host, dtype: torch.dtype, offset: int) -> None:
    """Vectors of 16 bytes, and the few elements before and after them; batches with none in between."""
    for rows in (1, 3, 70):
        bank = make_bank(80, 10)
        index = torch.zeros(rows + offset, dtype=dtype)[offset:].copy_(torch.randperm(80)[:rows])
        index[-1] = index[0]
        with on_the_host(cuda_host, "forward"):
            testing.check_step("cuda", torch.randn(rows, 10), index, bank, label_lr=40.0)


def test_a_step_that_was_cut_short_is_noticed(cuda_host: Host, order: str) -> None:
    """Its blocks have left a ticket behind: no later loss is a number until the bank is mended."""
    logits, index, bank = make("alike", 10, (F32, F32))
    bank.status[0] = 12345
    with on_the_host(cuda_host, order):
        for _ in range(2):
            assert d2_step(logits, index, bank, backend="cuda")[0].isnan()
        with pytest.raises(BankError, match="cut short"):
            bank.check()
        bank.load_state_dict(bank.state_dict())
        assert d2_step(logits, index, bank, backend="cuda")[0].isfinite()


@pytest.mark.parametrize("classes", slow_but([10, 100, 1000, 2000, 9000], [100, 9000]))
def test_logits_with_gaps_beyond_the_range_of_exp(cuda_host: Host, order: str, classes: int) -> None:
    check_step(cuda_host, order, classes, size=200.0)


@pytest.mark.parametrize(("where", "class_loss"), [("logits", "kl"), ("bank", "kl_reverse")])
def test_a_long_row_that_climbs_to_the_end_of_the_range(cuda_host: Host, where: str, class_loss: str) -> None:
    """Numerics: each piece of the row is so far above the one before that all before it underflows."""
    bank = make_bank(1, 120_000, labelled_every=0, scale=0.0)
    logits = torch.zeros(1, 120_000)
    (logits if where == "logits" else bank.pseudo_logits)[0] = torch.arange(120_000) // 8192 * 1e33
    with on_the_host(cuda_host, "forward"):
        loss, grad = d2_step(logits, torch.tensor([0]), bank, class_loss=class_loss, label_lr=1.0, backend="cuda")
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert bank.pseudo_logits.isfinite().all()


@pytest.mark.parametrize("classes", slow_but([10, 1000, 2000, 9000], [10, 9000]))
def test_labelled_samples_touch_no_bank_memory(cuda_host: Host, order: str, classes: int) -> None:
    bank = make_bank(12, classes)
    index = torch.tensor([0, 3, 9, 6, 3])
    with on_the_host(cuda_host, order) as reports:
        d2_step(torch.randn(5, classes), index, bank, backend="cuda")
        bank.predict_(index, torch.randn(5, classes), "cuda")
    assert len(reports) == 2
    for report in reports:
        assert report.reads("pseudo_logits").sum() + report.writes("pseudo_logits").sum() == 0
    assert reports[1].reads("logits").sum() == 0


def check_stochastic(
    host: Host, order: str, classes: int, layout: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """The definition's random bits, whatever the access; an element near the edge between two may fall on the other side."""
    logits, index, bank = make(layout, classes, dtypes, rounding="stochastic", seed=2**40 + 7, scale=0.01)
    kind = "alike" if layout == "alike" else "different"
    exact = make(kind, classes, dtypes, rounding="stochastic", seed=2**40 + 7, scale=0.01)[2]
    bank.updates.fill_(2**32 + 5)
    exact.updates.fill_(2**32 + 5)
    differing = 0
    for _ in range(2):
        with on_the_host(host, order):
            d2_step(logits, index, bank, label_lr=5.0, backend="cuda")
        reference.d2_step(logits, index, exact, label_lr=5.0)
        differing += int((bank.pseudo_logits != exact.pseudo_logits).sum())
        bank.pseudo_logits.copy_(exact.pseudo_logits)
    assert differing <= 3 + 0.004 * logits.numel(), f"{differing} elements rounded otherwise"
    assert int(bank.updates) == 2**32 + 7, "updates counted"


@pytest.mark.parametrize("layout", ["alike", "different", "padded", "duplicates"])
@pytest.mark.parametrize("classes", slow_but([10, 15, 129, 1000, 2049, 8200], [15, 129, 8200]))
def test_stochastic_rounding_by_vectors_and_by_elements(cuda_host: Host, classes: int, layout: str) -> None:
    for order, dtypes in zip(ORDERS, ((F32, BF16), (BF16, F16), (F16, BF16)), strict=True):
        check_stochastic(cuda_host, order, classes, layout, dtypes)


def check_statistics(host: Host, order: str, classes: int, class_loss: str = "kl_reverse") -> tuple[Tensor, ...]:
    """Sums over the sound unlabelled rows, added to what is there; returns all results of the step."""
    torch.manual_seed(0)
    logits, index, bank = make("padded", classes, (F32, F32), rows=max(rows_for(classes), 9))
    slots = bank.slots[index].long()
    owners = (slots >= 0).nonzero()[:, 0]
    bank.pseudo_logits[slots[owners[::3]]] = logits[owners[::3]] * 0.5  # these agree
    log_p, log_q = logits.double().log_softmax(1), reference.log_pseudo_probs(slots, bank)
    logits[owners[1], classes - 1] = float("nan")
    rows = [
        torch.ones(len(index)),
        reference.class_loss_rows(log_p, log_q, class_loss),
        -(log_p.exp() * log_p).sum(1),
        log_p.exp().amax(1),
        log_q.exp().amax(1),
        log_p.argmax(1) == log_q.argmax(1),
    ]
    sound = (slots >= 0) & logits.isfinite().all(1)
    assert rows[5][sound].unique().tolist() == [False, True], "some agree and some do not"
    expected = torch.tensor([*(float(row[sound].double().sum()) for row in rows), 1.0])
    statistics = torch.full((7,), 100.0, dtype=torch.float64)
    with on_the_host(host, order) as reports:
        step = StepOptions(0.1, 0.03, 40.0, 1.0, class_loss, 4.0, 3.0, True)
        loss, grad = cuda.step(logits, index, bank, step, statistics)
    assert [report.launches for report in reports] == [1], "launches"
    assert torch.allclose(statistics.float() - 100, expected, rtol=1e-5, atol=1e-4), "statistics"
    assert reports[0].writes("statistics").tolist() == [1] * 7, "writes of the statistics"
    return loss, grad, bank.pseudo_logits, statistics


@pytest.mark.parametrize("classes", slow_but([10, 33, 129, 1000, 1025, 8193, 20011], [33, 1025, 20011]))
def test_statistics(cuda_host: Host, classes: int) -> None:
    for order, class_loss in zip(ORDERS, CLASS_LOSSES, strict=True):
        check_statistics(cuda_host, order, classes, class_loss)
    # Determinism: the same bits whichever block is done last, and whichever thread comes first.
    for results in zip(*(check_statistics(cuda_host, order, classes) for order in ORDERS), strict=True):
        for other in results[1:]:
            assert torch.equal(results[0].nan_to_num(9.0), other.nan_to_num(9.0)), "not the same bits"


def test_an_empty_batch_is_a_step(cuda_host: Host, order: str) -> None:
    bank = make_bank(5, 10)
    nothing = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    with on_the_host(cuda_host, order) as reports:
        loss, grad = d2_step(*nothing, bank, backend="cuda")
        bank.predict_(nothing[1], nothing[0], "cuda")
        cuda.scale_gradient(grad, torch.tensor(2.0), 1.0, False)
    assert (loss.item(), bank.updates.item(), *bank.status.tolist()) == (0, 1, 0, 0)
    assert [report.launches for report in reports] == [1, 0, 0]


def check_predict(host: Host, order: str, classes: int, layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    logits, index, bank = make(layout, classes, dtypes)
    logits[1] *= 1e4  # beyond float16's range
    logits = logits.clamp(-6e4, 6e4) if dtypes[0] == F16 else logits
    before, slots = bank.pseudo_logits.clone(), bank.slots[index].long()
    with on_the_host(host, order) as reports:
        bank.predict_(index, logits, "cuda")
    assert [report.launches for report in reports] == [1], "launches"
    written = (slots >= 0) & reference.last_occurrence(slots)
    before[slots[written]] = saturate(logits[written].double(), dtypes[1])
    assert torch.equal(bank.pseudo_logits, before), "bank"
    reads, writes = reports[0].reads("logits"), reports[0].writes("pseudo_logits")
    assert (reads == 2 * written[:, None]).all(), "reads of the logits"
    rows = torch.zeros(len(writes), 1, dtype=torch.int32)
    rows[slots[written]] = 1
    assert (writes == rows).all(), "writes of the bank"
    assert reports[0].reads("pseudo_logits").sum() == 0, "reads of the bank"
    assert bank.status.tolist() == [0, 0], "status"


@pytest.mark.parametrize("layout", ["alike", "different", "padded", "duplicates"])
@pytest.mark.parametrize("classes", slow_but([2, 10, 15, 100, 255, 257, 1001, 3000], [15, 100, 1001]))
def test_a_prediction_is_one_launch(cuda_host: Host, classes: int, layout: str) -> None:
    for k, dtypes in enumerate(PAIRS):
        check_predict(cuda_host, ORDERS[k % 3], classes, layout, dtypes)


# Vectors that begin before the row and that end after it, and both.
@pytest.mark.parametrize("classes", slow_but([7, 10, 33, 129, 255, 1001, 1025, 8195], [7, 255, 1001]))
@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize("watched", [True, False])
def test_nothing_is_touched_beyond_the_edges_of_memory(cuda_host: Host, classes: int, edge: str, watched: bool) -> None:
    """Inaccessible pages see what the harness may not: accesses that the compiler did not instrument."""

    def guarded_like(tensor: Tensor, **options) -> Tensor:
        return guarded(torch.zeros(tensor.shape, dtype=tensor.dtype), edge)

    limit = backend.WATCHED_ELEMENTS if watched else 0
    for k, dtypes in enumerate(PAIRS[:: 2 if watched else 1]):
        logits, index, bank = make("alike", classes, dtypes)
        bank.pseudo_logits = guarded(bank.pseudo_logits[: len(index)], edge)
        bank.slots = bank.slots[: len(index)]
        logits = guarded(logits, edge)
        with (
            mock.patch.object(backend, "WATCHED_ELEMENTS", limit),
            on_the_host(cuda_host, ORDERS[k % 3]),
            mock.patch.object(torch, "empty_like", guarded_like),
        ):
            for class_loss in CLASS_LOSSES:
                grad = d2_step(logits, index, bank, class_loss=class_loss, backend="cuda")[1]
            bank.predict_(index, logits, "cuda")
            for keep in (True, False):
                cuda.scale_gradient(grad, torch.tensor(2.0), 1.0, keep)
        assert grad.data_ptr() % 4096 in (0, 4096 - grad.nbytes % 4096)


def check_scaled(
    host: Host, order: str, size: int, dtype: torch.dtype, factor: float, keep: bool, offset: int = 0
) -> None:
    """The kernel of backward, with grad_scale as a tensor as well as a number."""
    for scale in (2.0, torch.tensor(2.0)):
        memory = torch.randn(size + offset).to(dtype)
        grad, before = memory[offset:], memory.clone()
        with on_the_host(host, order) as reports:
            out = cuda.scale_gradient(grad, torch.tensor(2.0 * factor), scale, keep)
        assert [report.launches for report in reports] == [1], "launches"
        assert torch.equal(out, (before[offset:].float() * factor).to(dtype)), "gradient"
        touched = int(factor != 1 or keep)
        assert (reports[0].reads("grad") == touched).all(), "reads of the gradient"
        if keep:
            assert torch.equal(memory, before), "the saved gradient"
            assert (reports[0].writes("grad") == 0).all(), "writes of the saved gradient"
            assert (reports[0].writes(SCALED) == 1).all(), "writes of the gradient"
        else:
            assert out.data_ptr() == grad.data_ptr(), "in place"
            assert (reports[0].writes("grad") == touched).all(), "writes of the gradient"


class TestBackward:
    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
    @pytest.mark.parametrize("size", slow_but([1, 7, 255, 256, 1023, 1024, 1029, 5000], [7, 1024, 5000]))
    def test_a_factor_of_one_costs_nothing(self, cuda_host: Host, size: int, factor: float, keep: bool) -> None:
        for dtype, order in zip(DTYPES, ORDERS, strict=True):
            for offset in (0, 1, 8):
                check_scaled(cuda_host, order, size, dtype, factor, keep, offset)

    def test_a_large_gradient(self, cuda_host: Host) -> None:
        check_scaled(cuda_host, "permuted", BEYOND_ONE_ROUND, BF16, 0.5, keep=False)

    @pytest.mark.parametrize("in_tensor", [True, False])
    def test_each_of_forward_and_backward_is_one_launch(self, cuda_host: Host, order: str, in_tensor: bool) -> None:
        logits, bank = torch.randn(9, 100).half().requires_grad_(), make_bank(9, 100)
        scale = torch.tensor(1024.0) if in_tensor else 1024.0
        with on_the_host(cuda_host, order) as reports:
            loss = FusedD2Loss(bank, backend="cuda")(logits, torch.arange(9), grad_scale=scale)
            saved = loss.grad_fn.saved_tensors[0].clone()
            after_forward = bank.pseudo_logits.clone()
            (loss * 1024).backward(retain_graph=True)
            assert torch.equal(loss.grad_fn.saved_tensors[0], saved)
            first = logits.grad.clone()
            logits.grad = None
            (loss * 1024).backward()
        assert [report.launches for report in reports] == [1, 1, 1]
        assert torch.equal(first, saved)
        assert torch.equal(logits.grad, saved)
        assert torch.equal(bank.pseudo_logits, after_forward)
        # Kept, it had to be copied; the second time its factor of 1 was all that was read.
        assert (reports[1].reads("grad") == 1).all()
        assert (reports[1].writes("grad") == 0).all()
        assert reports[2].reads("grad").sum() + reports[2].writes("grad").sum() == 0
        assert reports[2].reads("grad_output").sum() > 0
