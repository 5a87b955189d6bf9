"""What a backend must do apart from being exact: predictions, bad indices, repeatability, autograd."""

from collections.abc import Callable
from functools import partial

import torch

from r2d2fast import BankError, FusedD2Loss, PseudoLabelBank, d2_step
from r2d2fast.doctor.inputs import StepInputs
from r2d2fast.rounding import saturate
from r2d2fast.testing import Mismatch, compare_rows

_SHAPES = ((37, 10), (37, 1001))


def equal_runs(backend: str, device: torch.device) -> None:
    for shape in ((4001, 10), (601, 1000)):
        inputs = StepInputs("duplicates", *shape)
        first = None
        for _ in range(5):
            bank = inputs.bank(device)
            loss, grad = d2_step(*inputs.batch_on(device), bank, backend=backend, **inputs.options(device))
            results = {"loss": loss, "gradient": grad, "bank": bank.pseudo_logits}
            first = first or results
            for name, result in results.items():
                if not torch.equal(result, first[name]):
                    raise Mismatch(f"the {name} of equal steps differs from run to run")


def empty_batch(backend: str, device: torch.device) -> None:
    inputs = StepInputs("random", 4, 10)
    bank = inputs.bank(device)
    before = bank.pseudo_logits.clone()
    logits, index = inputs.batch_on(device)
    loss, grad = d2_step(logits[:0], index[:0], bank, backend=backend)
    if float(loss) != 0 or grad.shape != (0, 10):
        raise Mismatch(f"an empty batch has loss {float(loss)} and a gradient of shape {list(grad.shape)}")
    compare_rows(bank, before)


def predictions(backend: str, device: torch.device) -> None:
    for batch, classes in _SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = StepInputs("duplicates", batch, classes, bank_dtype=dtype)
            bank = inputs.bank(device)
            logits, index = inputs.batch_on(device)
            expected = bank.pseudo_logits.clone()
            for sample, row in zip(
                index.tolist(), saturate(logits, inputs.bank_dtype), strict=True
            ):  # the last one counts
                if bank.slots[sample] >= 0:
                    expected[bank.slots[sample]] = row
            bank.predict_(index, logits, backend)
            compare_rows(bank, expected)


def predictions_not_finite(backend: str, device: torch.device) -> None:
    for batch, classes in _SHAPES:
        inputs = StepInputs("random", batch, classes)
        bank = inputs.bank(device)
        logits, index = inputs.batch_on(device)
        row = int((bank.slots[index] >= 0).nonzero()[0, 0])
        slot = bank.slots[index[row]]
        kept = bank.pseudo_logits[slot].clone()
        logits[row, -1] = torch.nan
        _refused(ValueError, partial(bank.predict_, index, logits, backend), bank, backend)
        if not torch.equal(bank.pseudo_logits[slot], kept):
            raise Mismatch(
                f"predict_ changed the pseudo-logits of sample {int(index[row])}, whose prediction holds a NaN"
            )


def index_out_of_range(backend: str, device: torch.device) -> None:
    for batch, classes in _SHAPES:
        for bad in (-1, 2 * batch, 2**40):
            inputs = StepInputs("random", batch, classes)
            bank, without = inputs.bank(device), inputs.bank(device)
            logits, index = inputs.batch_on(device)
            before, others = bank.pseudo_logits.clone(), torch.arange(batch, device=device) != 5
            d2_step(logits[others], index[others], without, normalizer=batch, backend=backend)
            index[5] = bad
            at_once = _refused(IndexError, partial(d2_step, logits, index, bank, backend=backend), bank, backend)
            compare_rows(bank, before if at_once else without.pseudo_logits)


def autograd(backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        inputs = StepInputs("random", 37, 1001, logits_dtype=dtype)
        logits, index = inputs.batch_on(device)
        _, expected = d2_step(logits, index, inputs.bank(device), grad_scale=4.0, backend=backend)
        for upstream, grad_scale in ((1.0, 1.0), (4.0, 1.0), (4.0, 4.0)):
            leaf = logits.clone().requires_grad_()
            loss = FusedD2Loss(inputs.bank(device), backend=backend)(leaf, index, grad_scale=grad_scale)
            (loss * upstream).backward()
            assert leaf.grad is not None
            worst = float((leaf.grad.float() - expected.float() * upstream / 4.0).abs().max())
            if not worst <= torch.finfo(dtype).eps * float(expected.float().abs().max()):
                raise Mismatch(
                    f"with an upstream gradient of {upstream} and grad_scale={grad_scale}, logits.grad is off by {worst:.3g}"
                )


CHECKS: dict[str, Callable[[str, torch.device], None]] = {
    "equal runs, equal bits": equal_runs,
    "empty batch": empty_batch,
    "predict_": predictions,
    "predict_ of NaN": predictions_not_finite,
    "index out of range": index_out_of_range,
    "autograd": autograd,
}


def _refused(expected: type[Exception], call: Callable[[], object], bank: PseudoLabelBank, backend: str) -> bool:
    """Mismatch unless the call raises (True), or, where the host does not wait for the kernel, ``bank.check()`` does (False)."""
    try:
        call()
    except expected:
        return True
    if backend in ("reference", "cpu"):
        raise Mismatch(f"did not raise {expected.__name__}")
    try:
        bank.check()
    except BankError:
        return False
    raise Mismatch("neither the call nor bank.check() raised an error")
