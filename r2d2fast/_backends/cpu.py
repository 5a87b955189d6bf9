"""The C++ kernel on CPU tensors."""

from typing import Any

import torch
from torch import Tensor

from r2d2fast._backends import native
from r2d2fast._backends.common import BackendStatus, address_of, unsupported_dtype
from r2d2fast._backends.native import bank_handle, batch_handle
from r2d2fast.options import CLASS_LOSSES, StepOptions
from r2d2fast.reference import Bank, out_of_range

_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")


def status() -> BackendStatus:
    if native.cpu.module is None:
        return BackendStatus(False, str(native.cpu.problem))
    found = ", ".join(native.cpu.module.instruction_sets())
    return BackendStatus(True, f"C++ on CPU tensors, using {native.cpu.module.instruction_set()} (runs here: {found})")


def why_not(logits: Tensor, rows: Tensor) -> str | None:
    if native.cpu.module is None:
        return native.cpu.problem
    if not logits.is_cpu:
        return f"the logits are on {logits.device}; these kernels are for CPU tensors"
    return unsupported_dtype(logits, rows)


def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    options: StepOptions,
    statistics: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    module: Any = native.cpu.module
    size, batch, _logits, index = batch_handle(logits, index)
    # One way of allocating for both: in training, where a network has emptied the caches, the first call of each takes 15 µs.
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    loss = torch.empty_like(_SCALAR, memory_format=torch.contiguous_format)
    row_losses = logits.new_empty(size, dtype=torch.float32) if options.reduction == "none" else None
    bad = module.step(
        bank_handle(bank), batch, CLASS_LOSSES.index(options.class_loss),
        options.scalars, options.normalizers(size), options.update,
        grad.data_ptr(), loss.data_ptr(), 0 if row_losses is None else row_losses.data_ptr(),
        0 if statistics is None else statistics.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(bank.slots)))
    return loss if row_losses is None else row_losses, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    module: Any = native.cpu.module
    _, batch, _logits, index = batch_handle(logits, index)
    bad, skipped, first = module.predict(bank_handle(bank), batch, torch.get_num_threads())
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(bank.slots)))
    return skipped, first


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float | Tensor, keep: bool) -> Tensor:
    module: Any = native.cpu.module
    if module.equals(address_of(grad_output), grad_scale):
        return grad
    return grad * (grad_output / grad_scale)
