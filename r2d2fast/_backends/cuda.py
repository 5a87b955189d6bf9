"""The CUDA kernels on the tensors' device and PyTorch's current stream; nothing here waits for them."""

import functools
from typing import Any

import torch
from torch import Tensor

from r2d2fast._backends import native
from r2d2fast._backends.common import CLASS_LOSSES, DTYPES, BackendStatus, Step, address_of, unsupported_dtype
from r2d2fast.errors import BackendError
from r2d2fast.reference import Bank


def status() -> BackendStatus:
    problem = _no_device()
    if problem is not None:
        return BackendStatus(False, problem)
    problems = [_no_machine_code(device) for device in range(torch.cuda.device_count())]
    names = [torch.cuda.get_device_name(device) for device, problem in enumerate(problems) if problem is None]
    if not names:
        return BackendStatus(False, "; ".join(map(str, problems)))
    return BackendStatus(True, f"CUDA C++ on CUDA tensors, built for {_built_for()} (devices here: {', '.join(names)})")


def why_not(logits: Tensor, rows: Tensor) -> str | None:
    problem = _no_device()
    if problem is not None:
        return problem
    if not logits.is_cuda:
        return f"the logits are on {logits.device}; these kernels are for CUDA tensors"
    return _no_machine_code(logits.device.index) or unsupported_dtype(logits, rows)


def step(logits: Tensor, index: Tensor, bank: Bank, p: Step, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    size = logits.shape[0]
    module = _module()
    batch, _kept = _batch(logits, index)
    normalizer, update_normalizer = p.normalizers(size)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    planes = 1 if statistics is None else module.results
    results = torch.empty(planes * size, dtype=torch.float32, device=logits.device)
    _launch(
        module.step, _bank(bank), batch, CLASS_LOSSES[p.class_loss],
        _scalar(p.alpha), _scalar(p.beta), _scalar(p.label_lr), _scalar(p.grad_scale),
        normalizer, update_normalizer, p.update,
        grad.data_ptr(), loss.data_ptr(), 0 if statistics is None else statistics.data_ptr(), results.data_ptr(),
        *_target(logits),
    )  # fmt: skip
    return loss, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    """Rows skipped are not known here, but to ``bank.check()``."""
    batch, _kept = _batch(logits, index)
    _launch(_module().predict, _bank(bank), batch, *_target(logits))
    return 0, -1


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float | Tensor, keep: bool) -> Tensor:
    factor = address_of(grad_output)
    if factor == 0:
        return grad * (grad_output / grad_scale)
    # In place, so that a factor of 1 costs nothing, unless a second backward will want what forward has saved.
    out = torch.empty_like(grad) if keep else grad
    _launch(
        _module().scale, out.data_ptr(), grad.data_ptr(), grad.numel(), DTYPES[grad.dtype],
        factor, _scalar(grad_scale), *_target(grad),
    )  # fmt: skip
    return out


def _module() -> Any:
    return native.cuda.module


def _no_device() -> str | None:
    if native.cuda.module is None:
        return native.cuda.problem
    if torch.version.cuda is None:
        return "the CUDA kernels were built, but this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "the CUDA kernels were built, but PyTorch finds no CUDA device here"
    return _driver_too_old()


@functools.cache
def _driver_too_old() -> str | None:
    """The kernels bring the CUDA runtime of their nvcc, which may ask for a newer driver than PyTorch's own does."""
    built, served = _module().cuda_version // 1000, _module().driver_version() // 1000
    if served >= built:
        return None
    return (
        f"the CUDA kernels were built with CUDA {built}, and this driver serves CUDA {served}; "
        "update the driver, or install again with the nvcc of an older toolkit first on PATH"
    )


@functools.cache
def _no_machine_code(device: int) -> str | None:
    """Machine code runs on later GPUs of its generation, the PTX of the last architecture on all later ones."""
    major, minor = torch.cuda.get_device_capability(device)
    arch, built = 10 * major + minor, _module().architectures
    if arch >= built[-1] or any(one <= arch and one // 10 == major for one in built):
        return None
    return (
        f"the CUDA kernels were built for {_built_for()}, and {torch.cuda.get_device_name(device)} is sm_{arch}; "
        f"run R2D2FAST_CUDA_ARCHS={arch} pip install -e . again in the r2d2fast checkout"
    )


def _built_for() -> str:
    return ", ".join(f"sm_{arch}" for arch in _module().architectures) + " and PTX of the last"


def _batch(logits: Tensor, index: Tensor) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The batch, and the tensors that must outlive the launch: the stream's memory pool may reuse them after it."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    index = index.contiguous()
    batch = _module().Batch(
        logits.data_ptr(), DTYPES[logits.dtype], logits.shape[0], logits.stride(0),
        index.data_ptr(), index.dtype == torch.int64,
    )  # fmt: skip
    return batch, (logits, index)


def _bank(bank: Bank) -> Any:
    rows, slots = bank.pseudo_logits, bank.slots
    return _module().Bank(
        rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), slots.data_ptr(), slots.shape[0], rows.shape[1],
        bank.label_scale, bank.rounding == "stochastic", bank.seed, bank.step.data_ptr(), bank.status.data_ptr(),
    )  # fmt: skip


def _scalar(value: float | Tensor) -> tuple[float, int]:
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)


def _target(tensor: Tensor) -> tuple[int, int]:
    device = tensor.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


def _launch(kernel: Any, *arguments: Any) -> None:
    try:
        kernel(*arguments)
    except RuntimeError as error:
        raise BackendError(f"{error}; `python -m r2d2fast.doctor` checks this device") from error
