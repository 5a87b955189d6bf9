"""Where a step writes its gradient: ``out=``, logits that are overwritten, and what autograd says of it."""

import math
from contextlib import nullcontext

import pytest
import torch

from r2d2fast import FusedD2Loss, d2_loss, d2_step
from r2d2fast.bank import DTYPES
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import compare, expect, make_bank
from tests.sizes import NARROW_AND_WIDE

OPTIONS = {"label_lr": 300.0, "normalizer": 4.0}
REPEATED = torch.tensor([1, 2, 1, 4, 1, 2, 0, 0, 5])  # 0 is labelled


def check_out(backend, logits, index, bank, out, **options):
    """The step into ``out`` against float64; loss and gradient."""
    expected = expect(logits, index, bank, **options)
    version = out._version
    loss, grad = d2_step(logits, index, bank, out=out, backend=backend, **options)
    compare(expected, loss, grad, bank)
    assert grad.data_ptr() == out.data_ptr()
    assert grad.shape == out.shape
    assert out._version > version
    return loss, grad


@pytest.mark.parametrize("overwritten", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@NARROW_AND_WIDE
def test_the_gradient_is_where_it_was_asked_for(backend, classes, class_loss, dtype, overwritten):
    """With repeated and labelled samples and a row that is not finite; loss, gradient and bank bit for bit as without ``out``."""
    logits = (torch.randn(9, classes) * 3).to(dtype)
    logits[4, 1] = math.inf
    options = OPTIONS | {"class_loss": class_loss}
    plain_bank, bank = make_bank(6, classes), make_bank(6, classes)
    plain = d2_step(logits, REPEATED, plain_bank, backend=backend, **options)
    given = logits.clone()
    out = given if overwritten else torch.full_like(logits, 7.0)
    loss, grad = check_out(backend, given, REPEATED, bank, out, **options)
    torch.testing.assert_close((loss, grad), plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bank.pseudo_logits, plain_bank.pseudo_logits)
    assert overwritten or torch.equal(given, logits)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_rows_that_are_read_more_than_once_are_overwritten_in_their_last_read(backend, class_loss):
    """As long as those that the GPU kernels read in pieces."""
    logits = torch.randn(3, 9001)
    check_out(backend, logits, torch.tensor([1, 0, 1]), make_bank(2, 9001), logits, class_loss=class_loss, **OPTIONS)


def test_of_rows_in_tiles_one_with_gaps_is_done_again_from_its_logits(backend):
    logits = torch.randn(20, 10)
    logits[3, 0] = 3e38
    bank, plain_bank = make_bank(20, 10), make_bank(20, 10)
    _, plain = d2_step(logits, torch.arange(20), plain_bank, backend=backend)
    _, grad = d2_step(logits, torch.arange(20), bank, out=logits, backend=backend)
    assert torch.equal(grad, plain)
    assert torch.equal(bank.pseudo_logits, plain_bank.pseudo_logits)


@NARROW_AND_WIDE
def test_of_logits_with_gaps_the_gradient_has_none(backend, classes):
    wide = torch.randn(9, classes + 3)
    out = torch.full((9, classes), 7.0)
    check_out(backend, wide[:, 1:-2], torch.arange(9), make_bank(9, classes), out, **OPTIONS)


@pytest.mark.parametrize("overwritten", [True, False])
def test_neighbours_in_one_buffer_are_memory_of_their_own(backend, overwritten):
    buffer = torch.randn(4 * 5 * 20)
    before, logits = buffer.clone(), buffer[100:200].view(5, 20)
    out = logits if overwritten else buffer[200:300].view(5, 20)
    check_out(backend, logits, torch.arange(5), make_bank(8, 20), out, **OPTIONS)
    others = torch.ones_like(buffer, dtype=torch.bool)
    others[100:200] &= not overwritten
    others[200:300] &= overwritten
    assert torch.equal(buffer[others], before[others])


@pytest.mark.parametrize("overwritten", [True, False])
def test_an_empty_batch(backend, overwritten):
    logits, index = torch.empty(0, 20), torch.empty(0, dtype=torch.int64)
    out = logits if overwritten else torch.empty(0, 20)
    loss, grad = d2_step(logits, index, make_bank(8, 20), out=out, backend=backend)
    assert loss == 0
    assert grad.shape == (0, 20)


def test_float64_by_the_reference():
    logits = torch.randn(5, 20, dtype=torch.float64)
    _, plain = d2_step(logits, torch.arange(5), make_bank(8, 20))
    _, grad = d2_step(logits, torch.arange(5), make_bank(8, 20), out=logits)
    assert grad.dtype == torch.float64
    assert torch.equal(logits, plain)


def test_an_index_out_of_range_leaves_the_logits_alone(backend):
    if backend in ("cuda", "triton"):
        pytest.skip("a GPU goes on and writes NaN for that row alone")
    logits = torch.randn(4, 20)
    before = logits.clone()
    with pytest.raises(IndexError, match=r"index\[2\] is 20"):
        d2_step(logits, torch.tensor([1, 2, 20, 4]), make_bank(20, 20), out=logits, backend=backend)
    assert torch.equal(logits, before)


class TestRefused:
    """What would overwrite something else, or fits no gradient: said before anything is written."""

    def refuse(self, backend, error, message, out, logits, index, bank):
        tensors = (logits, index, bank.pseudo_logits, bank.updates)
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(error, match=message):
            d2_step(logits, index, bank, out=out, backend=backend)
        with pytest.raises(error, match=message):
            FusedD2Loss(bank, backend=backend).step(logits, index, out=out)
        assert all(map(torch.equal, tensors, before))

    @pytest.mark.parametrize(
        ("out", "error", "message"),
        [
            ([1.0], TypeError, "out is a list; pass a tensor like logits"),
            (torch.zeros(4, 19), ValueError, r"out is torch.float32, \[4, 19\].*pass torch.empty_like"),
            (
                torch.zeros(5, 20),
                ValueError,
                r"out is torch.float32, \[5, 20\].*must be contiguous, torch.float32, \[4, 20\]",
            ),
            (torch.zeros(4, 20).half(), ValueError, "out is torch.float16"),
            (torch.zeros(20, 4).t(), ValueError, r"strides \[1, 4\]"),
            (torch.zeros(4, 20, device="meta"), ValueError, "on meta; it must be contiguous, torch.float32, .* on cpu"),
            (
                torch.zeros(4, 20, requires_grad=True),
                ValueError,
                r"over a leaf that requires one.*pass out=tensor.detach\(\)",
            ),
            (
                torch.zeros(80, requires_grad=True).view(4, 20),
                ValueError,
                r"over a view of a leaf that requires one.*pass out=tensor.detach\(\)",
            ),
        ],
    )
    def test_what_is_not_like_the_gradient(self, out, error, message):
        self.refuse("auto", error, message, out, torch.randn(4, 20), torch.arange(4), make_bank(8, 20))

    def test_a_part_of_the_logits(self, backend):
        buffer, bank = torch.randn(200), make_bank(8, 20)
        logits = buffer[:80].view(4, 20)
        for shift in (1, 20, 79):
            out = buffer[shift : shift + 80].view(4, 20)
            self.refuse(
                backend, ValueError, "out shares memory with a part of logits", out, logits, torch.arange(4), bank
            )

    def test_logits_with_gaps(self, backend):
        wide, bank = torch.randn(4, 30), make_bank(8, 20)
        self.refuse(backend, ValueError, "out is .*strides", wide[:, :20], wide[:, :20], torch.arange(4), bank)
        out = wide.view(-1)[:80].view(4, 20)
        self.refuse(backend, ValueError, "with a part of logits", out, wide[:, :20], torch.arange(4), bank)

    def test_rows_of_the_bank(self, backend):
        bank = make_bank(8, 20, labelled_every=0)
        for logits in (torch.randn(4, 20), bank.pseudo_logits[4:]):
            message = "with the bank's rows.*pass torch.empty_like"
            self.refuse(backend, ValueError, message, bank.pseudo_logits[4:], logits, torch.arange(4), bank)

    def test_statistics(self):
        bank = make_bank(8, 2)
        criterion = FusedD2Loss(bank, statistics=True, backend="reference")
        out = criterion.statistics[:6].view(3, 2)
        with pytest.raises(ValueError, match="out shares memory with the statistics"):
            criterion.step(torch.randn(3, 2).double(), torch.arange(3), out=out)
        assert not criterion.statistics.any()

    def test_the_index(self, backend):
        index, bank = torch.arange(4), make_bank(8, 2)
        out = index.view(torch.float32).view(4, 2)
        self.refuse(backend, ValueError, "out shares memory with index", out, torch.randn(4, 2), index, bank)


class TestAutograd:
    def gradients(self, overwrite):
        torch.manual_seed(3)
        network, x = torch.nn.Linear(5, 20), torch.randn(6, 5, requires_grad=True)
        bank = make_bank(8, 20)
        overwrite(network(x), torch.arange(6), bank)
        return network.weight.grad, network.bias.grad, x.grad, bank.pseudo_logits

    @pytest.mark.parametrize(
        "how",
        [
            lambda logits, index, bank: logits.backward(d2_step(logits, index, bank, out=logits)[1]),
            lambda logits, index, bank: logits.backward(FusedD2Loss(bank).step(logits, index, out=logits)[1]),
            lambda logits, index, bank: FusedD2Loss(bank, inplace=True)(logits, index).backward(),
            lambda logits, index, bank: d2_loss(logits, index, bank, inplace=True).backward(),
            lambda logits, index, bank: d2_loss(
                logits, index, bank, inplace=True, sample_weight=torch.ones(6)
            ).backward(),
        ],
    )
    def test_a_linear_layer_gets_the_gradient_it_gets_otherwise(self, how):
        expected = self.gradients(lambda logits, index, bank: FusedD2Loss(bank)(logits, index).backward())
        for ours, theirs in zip(self.gradients(how), expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_the_forward_call_overwrites_the_logits_and_upstream_factors_reach_the_gradient(self, backend):
        logits, index = torch.randn(6, 20), torch.arange(6)
        _, plain = d2_step(logits, index, make_bank(8, 20), backend=backend)
        leaf = logits.clone().requires_grad_()
        given = leaf * 1.0
        loss = FusedD2Loss(make_bank(8, 20), inplace=True, backend=backend)(given, index)
        assert torch.equal(given, plain)
        (2 * loss).backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(leaf.grad, 3 * plain)

    @pytest.mark.parametrize("step", [d2_step, lambda *of, out: (None, FusedD2Loss(of[2], inplace=True)(*of[:2]))])
    def test_an_operation_that_needs_its_result_says_so(self, step):
        logits = torch.randn(6, 20, requires_grad=True).tanh()
        _, result = step(logits, torch.arange(6), make_bank(8, 20), out=logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward() if result.dim() == 0 else logits.backward(result)

    def test_logits_changed_before_backward_are_noticed(self):
        logits = torch.randn(6, 20, requires_grad=True) * 1.0
        loss = FusedD2Loss(make_bank(8, 20), inplace=True)(logits, torch.arange(6))
        logits.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("how", ["no_grad", "inference_mode", "needs none"])
    def test_logits_without_a_gradient_stay(self, how):
        logits, criterion = torch.randn(6, 20), FusedD2Loss(make_bank(8, 20), inplace=True)
        before = logits.clone()
        if how == "needs none":
            criterion(logits, torch.arange(6))
        else:
            with getattr(torch, how)():
                criterion(logits.requires_grad_(), torch.arange(6))
        assert torch.equal(logits, before)

    def test_out_of_a_parameter_without_its_history_is_written_to(self):
        parameter = torch.zeros(80, requires_grad=True)
        for out in (parameter.view(4, 20).detach(), parameter.detach().view(4, 20)):
            _, grad = d2_step(torch.randn(4, 20), torch.arange(4), make_bank(8, 20), out=out)
            assert torch.equal(parameter, grad.view(80))

    @pytest.mark.parametrize("inplace", [True, False])
    def test_a_parameter_of_which_the_logits_are_a_view_stays(self, inplace):
        parameter = torch.nn.Parameter(torch.randn(120))
        before = parameter.detach().clone()
        criterion = FusedD2Loss(make_bank(8, 20), inplace=inplace)
        with pytest.raises(ValueError, match="over a view of a leaf") if inplace else nullcontext():
            criterion(parameter.view(6, 20), torch.arange(6)).backward()
        assert torch.equal(parameter, before)

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (torch.zeros(6, 20, requires_grad=True), "over a leaf that requires one.*: leave inplace=True out"),
            (torch.zeros(20, 6, requires_grad=True).t() * 1.0, r"strides \[1, 6\].*make logits contiguous"),
        ],
    )
    def test_logits_that_cannot_be_overwritten_are_refused(self, logits, message):
        with pytest.raises(ValueError, match=message):
            FusedD2Loss(make_bank(8, 20), inplace=True)(logits, torch.arange(6))
