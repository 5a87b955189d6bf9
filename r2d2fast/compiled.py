"""The D2 step under ``torch.compile``: operators that PyTorch's compilers call and do not look into.

``torch.ops.r2d2fast.d2_step`` declares that it changes the bank, ``d2_step_out`` there that it changes the tensor for the
gradient, too; ``torch.ops.r2d2fast.attach_gradient`` has the derivative. An operator takes tensors and plain values and has
no type "number or tensor": bank and options go in field by field, and each scalar of the options as both, one of them empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r2d2fast._backends import choose
from r2d2fast._backends.checks import apart, check_memory
from r2d2fast.options import StepOptions
from r2d2fast.reference import Bank


def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    options: StepOptions,
    statistics: Tensor | None,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, while ``torch.compile`` traces."""
    scalars = options[:4]  # torch 2.10 cannot trace a property of a named tuple
    arguments = (
        logits.detach(),
        index,
        bank.pseudo_logits,
        bank.slots,
        bank.updates,
        bank.status,
        statistics,
        bank.label_scale,
        bank.rounding,
        bank.seed,
        [_number(scalar) for scalar in scalars],
        [_tensor(scalar) for scalar in scalars],
        *options[4:],
        backend,
    )
    if out is None:
        return torch.ops.r2d2fast.d2_step(*arguments)
    return torch.ops.r2d2fast.d2_step_out(*arguments, out), out


def attach(logits: Tensor, loss: Tensor, grad: Tensor, grad_scale: float | Tensor) -> Tensor:
    """``loss``, of the batch or of each row, with its derivative, while ``torch.compile`` traces."""
    return torch.ops.r2d2fast.attach_gradient(logits, loss, grad, _number(grad_scale), _tensor(grad_scale))


def _number(scalar: float | Tensor) -> float:
    return 1.0 if isinstance(scalar, Tensor) else scalar


def _tensor(scalar: float | Tensor) -> Tensor | None:
    return scalar if isinstance(scalar, Tensor) else None


_WRITTEN = ("pseudo_logits", "updates", "status", "statistics")
_ARGUMENTS = (
    "Tensor logits, Tensor index, Tensor(a!) pseudo_logits, Tensor slots, Tensor(b!) updates, Tensor(c!) status, "
    "Tensor(d!)? statistics, float label_scale, str rounding, int seed, float[] numbers, Tensor?[] tensors, str class_loss, "
    "float? normalizer, float? update_normalizer, bool update, str reduction, int batches, str backend"
)


def _run(
    logits: Tensor,
    index: Tensor,
    pseudo_logits: Tensor,
    slots: Tensor,
    updates: Tensor,
    status: Tensor,
    statistics: Tensor | None,
    label_scale: float,
    rounding: str,
    seed: int,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    class_loss: str,
    normalizer: float | None,
    update_normalizer: float | None,
    update: bool,
    reduction: str,
    batches: int,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    bank = Bank(pseudo_logits, slots, updates, status, label_scale, rounding, seed)
    alpha, beta, label_lr, grad_scale = (n if t is None else t for n, t in zip(numbers, tensors, strict=True))
    options = StepOptions(
        alpha, beta, label_lr, grad_scale, class_loss, normalizer, update_normalizer, update, reduction, batches
    )
    options.check(pseudo_logits)
    if out is not None:
        check_memory(out, logits, index, bank, statistics)
    return choose(backend, logits, pseudo_logits).step(apart(logits, bank), index, bank, options, statistics, out)


@torch.library.custom_op("r2d2fast::d2_step", mutates_args=_WRITTEN, schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _step_operator(*arguments):  # type: ignore[no-untyped-def]
    return _run(*arguments)


@torch.library.custom_op(
    "r2d2fast::d2_step_out", mutates_args=(*_WRITTEN, "out"), schema=f"({_ARGUMENTS}, Tensor(e!) out) -> Tensor"
)
def _out_operator(*arguments):  # type: ignore[no-untyped-def]
    loss, _ = _run(*arguments)
    return loss


@_step_operator.register_fake
def _(logits, *args):  # type: ignore[no-untyped-def]
    *_, reduction, _, _ = args
    return _empty_loss(logits, reduction), torch.empty_like(logits, memory_format=torch.contiguous_format)


@_out_operator.register_fake
def _(logits, *args):  # type: ignore[no-untyped-def]
    *_, reduction, _, _, _ = args
    return _empty_loss(logits, reduction)


def _empty_loss(logits: Tensor, reduction: str) -> Tensor:
    shape = logits.shape[:1] if reduction == "none" else ()
    return logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.custom_op("r2d2fast::attach_gradient", mutates_args=())
def _attach_operator(
    logits: Tensor, loss: Tensor, grad: Tensor, grad_scale: float, grad_scale_tensor: Tensor | None
) -> Tensor:
    """``loss`` again, with ``grad / grad_scale`` as its derivative with respect to ``logits``."""
    return loss.clone()


@_attach_operator.register_fake
def _(logits, loss, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(loss)


def _keep_gradient(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, grad, ctx.grad_scale, grad_scale_tensor = inputs
    ctx.save_for_backward(grad, grad_scale_tensor)


def _scaled_gradient(ctx, grad_output):  # type: ignore[no-untyped-def]
    grad, grad_scale_tensor = ctx.saved_tensors
    scale = ctx.grad_scale if grad_scale_tensor is None else grad_scale_tensor
    factor = grad_output / scale
    return grad * (factor[:, None] if factor.dim() else factor), None, None, None, None


_attach_operator.register_autograd(_scaled_gradient, setup_context=_keep_gradient)
