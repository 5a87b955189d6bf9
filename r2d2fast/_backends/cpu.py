"""The C++ kernel on CPU tensors: addresses and sizes of checked tensors, handed to ``csrc/``."""

from typing import Any

import torch
from torch import Tensor

from r2d2fast._backends import native
from r2d2fast._backends.common import CLASS_LOSSES, DTYPES, BackendStatus, Step, address_of, unsupported_dtype
from r2d2fast.reference import Bank, out_of_range


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


def step(logits: Tensor, index: Tensor, bank: Bank, p: Step, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    native_module: Any = native.cpu.module
    size, classes = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if not index.is_contiguous():
        index = index.contiguous()
    rows, slots = bank.pseudo_logits, bank.slots
    normalizer, update_normalizer = p.normalizers(size)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    loss = torch.empty((), dtype=torch.float32)
    bad = native_module.step(
        rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), slots.data_ptr(), slots.shape[0], classes,
        bank.label_scale, bank.rounding == "stochastic", bank.seed, bank.step.data_ptr(),
        logits.data_ptr(), DTYPES[logits.dtype], size, logits.stride(0),
        index.data_ptr(), index.dtype == torch.int64,
        grad.data_ptr(), loss.data_ptr(), 0 if statistics is None else statistics.data_ptr(),
        CLASS_LOSSES[p.class_loss], p.alpha, p.beta, p.grad_scale / normalizer, p.label_lr / update_normalizer,
        normalizer, p.update, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(slots)))
    return loss, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    native_module: Any = native.cpu.module
    size, classes = logits.shape
    logits, index = logits.contiguous(), index.contiguous()
    rows, slots = bank.pseudo_logits, bank.slots
    bad, skipped, first = native_module.predict(
        rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), slots.data_ptr(), slots.shape[0], classes,
        logits.data_ptr(), DTYPES[logits.dtype], size, logits.stride(0),
        index.data_ptr(), index.dtype == torch.int64, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(slots)))
    return skipped, first


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float | Tensor, keep: bool) -> Tensor:
    native_module: Any = native.cpu.module
    if native_module.equals(address_of(grad_output), grad_scale):
        return grad
    return grad * (grad_output / grad_scale)
