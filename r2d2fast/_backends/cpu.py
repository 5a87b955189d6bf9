"""The C++ kernel on CPU tensors: addresses and sizes of checked tensors, handed to ``csrc/``."""

from typing import Any

import torch
from torch import Tensor

from r2d2fast._backends import native
from r2d2fast._backends.common import Step
from r2d2fast.reference import Bank, out_of_range

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CLASS_LOSSES = {"kl_reverse": 0, "kl": 1, "mse": 2}


def step(logits: Tensor, index: Tensor, bank: Bank, p: Step, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    native_module: Any = native.module
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
        rows.data_ptr(), DTYPES[rows.dtype], slots.data_ptr(), slots.shape[0], classes,
        bank.label_scale, bank.rounding == "stochastic", bank.seed, bank.step.data_ptr(),
        logits.data_ptr(), DTYPES[logits.dtype], size, logits.stride(0),
        index.data_ptr(), index.dtype == torch.int64,
        grad.data_ptr(), loss.data_ptr(), 0 if statistics is None else statistics.data_ptr(),
        _CLASS_LOSSES[p.class_loss], p.alpha, p.beta, p.grad_scale / normalizer, p.label_lr / update_normalizer,
        normalizer, p.update, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(slots)))
    return loss, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    native_module: Any = native.module
    size, classes = logits.shape
    logits, index = logits.contiguous(), index.contiguous()
    rows, slots = bank.pseudo_logits, bank.slots
    bad, skipped, first = native_module.predict(
        rows.data_ptr(), DTYPES[rows.dtype], slots.data_ptr(), slots.shape[0], classes,
        logits.data_ptr(), DTYPES[logits.dtype], size, logits.stride(0),
        index.data_ptr(), index.dtype == torch.int64, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(out_of_range(int(index[bad]), bad, len(slots)))
    return skipped, first


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float) -> Tensor:
    native_module: Any = native.module
    try:
        if native_module.equals(grad_output.data_ptr(), grad_scale):
            return grad
    except RuntimeError:  # a batch of gradients (vmap over backward) has no memory to read
        pass
    return grad * (grad_output / grad_scale)
