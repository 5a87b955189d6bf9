"""The D2 step as an operator: checked arguments, the backend called, and its registration with PyTorch.

Eager code calls :func:`run`. ``torch.compile``, by :func:`run_compiled`, reaches the same backends through
``torch.ops.r2d2fast.d2_step``, which declares that it changes the bank, and ``torch.ops.r2d2fast.attach_gradient``, which
has the derivative.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from r2d2fast._backends import choose
from r2d2fast._backends.common import CLASS_LOSSES, SCALARS, BankTensors, Step
from r2d2fast.reference import Bank


def check(logits: Tensor, index: Tensor, bank: Bank) -> None:
    """TypeError or ValueError unless ``logits`` ``[B, N]`` and ``index`` ``[B]`` fit each other and the bank."""
    rows = bank.pseudo_logits
    classes = rows.shape[1]
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise ValueError(f"logits are {list(logits.shape)}, but this bank has {classes} classes: pass [B, {classes}]")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; pass the network's floating-point output, before any softmax")
    check_index(index)
    if index.shape != logits.shape[:1]:
        raise ValueError(
            f"index is {list(index.shape)} for {logits.shape[0]} rows of logits: pass one sample number a row"
        )
    if logits.device != rows.device or index.device != rows.device:
        raise ValueError(
            f"logits are on {logits.device}, index on {index.device}, the bank on {rows.device}: "
            f"move them with .to({str(rows.device)!r}), or the bank with bank.to(device)"
        )


def check_index(index: Tensor) -> None:
    """TypeError unless sample numbers are int64 or int32."""
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index is {index.dtype}; pass int64 or int32 sample numbers")


def check_scalars(step: Step, bank: Bank) -> None:
    """ValueError for a weight, divisor or class loss that has no meaning or would harm the bank."""
    numbers: Iterable[float | Tensor] = step[:4]
    if any(isinstance(number, Tensor) for number in numbers):
        numbers = _known_numbers(step, bank)
    alpha, beta, label_lr, grad_scale = numbers
    divisors = {"normalizer": step.normalizer, "update_normalizer": step.update_normalizer, "grad_scale": grad_scale}
    # One NaN here would overwrite every row of the batch in the bank.
    if not math.isfinite(alpha + beta + label_lr):
        raise ValueError(f"alpha is {alpha}, beta is {beta}, label_lr is {label_lr}; they must be finite")
    if not all(value is None or 0 < value < math.inf for value in divisors.values()):
        given = ", ".join(f"{name} is {value}" for name, value in divisors.items() if value is not None)
        raise ValueError(f"{given}; they must be positive and finite")
    if step.class_loss not in CLASS_LOSSES:
        raise ValueError(f"class_loss is {step.class_loss!r}; accepted: {', '.join(CLASS_LOSSES)}")


def _known_numbers(step: Step, bank: Bank) -> Iterator[float]:
    """The scalars as numbers, 1 for those on a GPU: reading them would make the host wait, so the kernel checks them."""
    for name in SCALARS:
        value = getattr(step, name)
        if isinstance(value, Tensor) and (
            value.dim() != 0 or value.dtype != torch.float32 or value.device != bank.pseudo_logits.device
        ):
            raise ValueError(
                f"{name} is a {value.dtype} tensor of shape {list(value.shape)} on {value.device}; "
                f"pass a number, or a float32 tensor of shape [] on {bank.pseudo_logits.device}"
            )
        yield 1.0 if isinstance(value, Tensor) and value.is_cuda else float(value)


def _apart(logits: Tensor, bank: Bank) -> Tensor:
    """``logits`` in memory of their own, should they be rows of the bank: a kernel writes one row before it reads another."""
    shared = logits.untyped_storage().data_ptr() == bank.pseudo_logits.untyped_storage().data_ptr()
    return logits.clone() if shared else logits


def run(
    backend: ModuleType, logits: Tensor, index: Tensor, bank: Bank, step: Step, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step in eager mode: (loss, grad)."""
    result = backend.step(_apart(logits, bank), index, bank, step, statistics)
    if step.update:  # in-place writes that autograd cannot see by itself
        torch.autograd.graph.increment_version(bank.pseudo_logits)
    return result


def run_compiled(
    logits: Tensor, index: Tensor, bank: Bank, step: Step, statistics: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The same step while ``torch.compile`` traces: through the registered operator."""
    return torch.ops.r2d2fast.d2_step(
        logits.detach(),
        index,
        bank.pseudo_logits,
        bank.slots,
        bank.step,
        bank.status,
        statistics,
        bank.label_scale,
        bank.rounding,
        bank.seed,
        *(_number(getattr(step, name)) for name in SCALARS),
        [_tensor(getattr(step, name)) for name in SCALARS],
        step.class_loss,
        step.normalizer,
        step.update_normalizer,
        step.update,
        backend,
    )


def attach_compiled(logits: Tensor, loss: Tensor, grad: Tensor, grad_scale: float | Tensor) -> Tensor:
    """``loss`` with its derivative, while ``torch.compile`` traces."""
    return torch.ops.r2d2fast.attach_gradient(logits, loss, grad, _number(grad_scale), _tensor(grad_scale))


# An operator's schema has no type "number or tensor": each scalar goes in as both, one of them empty.
def _number(scalar: float | Tensor) -> float:
    return 1.0 if isinstance(scalar, Tensor) else scalar


def _tensor(scalar: float | Tensor) -> Tensor | None:
    return scalar if isinstance(scalar, Tensor) else None


def predict_(bank: Bank, index: Tensor, logits: Tensor, backend: str) -> None:
    """Set rows to logits; see :meth:`r2d2fast.PseudoLabelBank.predict_`."""
    check(logits, index, bank)
    skipped, first = choose(backend, logits, bank.pseudo_logits).predict(bank, index, _apart(logits, bank))
    torch.autograd.graph.increment_version(bank.pseudo_logits)
    if skipped:
        raise ValueError(
            f"{skipped} of {len(index)} rows of logits are not finite, first for sample {int(index[first])}; "
            "these samples keep the pseudo-logits they had, the others are set. Has the network diverged?"
        )


@torch.library.custom_op("r2d2fast::d2_step", mutates_args=("pseudo_logits", "step", "status", "statistics"))
def d2_step_op(
    logits: Tensor,
    index: Tensor,
    pseudo_logits: Tensor,
    slots: Tensor,
    step: Tensor,
    status: Tensor,
    statistics: Tensor | None,
    label_scale: float,
    rounding: str,
    seed: int,
    alpha: float,
    beta: float,
    label_lr: float,
    grad_scale: float,
    scalars: Sequence[Tensor | None],
    class_loss: str,
    normalizer: float | None,
    update_normalizer: float | None,
    update: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    bank = BankTensors(pseudo_logits, slots, step, status, label_scale, rounding, seed)
    numbers = (alpha, beta, label_lr, grad_scale)
    a, b, rate, scale = (n if tensor is None else tensor for n, tensor in zip(numbers, scalars, strict=True))
    full_step = Step(a, b, rate, scale, class_loss, normalizer, update_normalizer, update)
    check_scalars(full_step, bank)
    return choose(backend, logits, pseudo_logits).step(_apart(logits, bank), index, bank, full_step, statistics)


@d2_step_op.register_fake
def _(logits, index, pseudo_logits, *args):  # type: ignore[no-untyped-def]
    loss_dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=loss_dtype), torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("r2d2fast::attach_gradient", mutates_args=())
def attach_gradient(
    logits: Tensor, loss: Tensor, grad: Tensor, grad_scale: float, grad_scale_tensor: Tensor | None
) -> Tensor:
    """``loss`` again, with ``grad / grad_scale`` as its derivative with respect to ``logits``."""
    return loss.clone()


@attach_gradient.register_fake
def _(logits, loss, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(loss)


def _keep_gradient(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, grad, ctx.grad_scale, grad_scale_tensor = inputs
    ctx.save_for_backward(grad, grad_scale_tensor)


def _scaled_gradient(ctx, grad_output):  # type: ignore[no-untyped-def]
    grad, grad_scale_tensor = ctx.saved_tensors
    scale = ctx.grad_scale if grad_scale_tensor is None else grad_scale_tensor
    return grad * (grad_output / scale), None, None, None, None


attach_gradient.register_autograd(_scaled_gradient, setup_context=_keep_gradient)
