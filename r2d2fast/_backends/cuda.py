"""The CUDA kernels on the tensors' device and PyTorch's current stream; nothing here waits for them."""

import functools
from typing import Any

import torch
from torch import Tensor

from r2d2fast._backends import native
from r2d2fast._backends.common import DTYPES, BackendStatus, address_of, unsupported_dtype
from r2d2fast._backends.native import bank_handle, batch_handle
from r2d2fast.command import as_called
from r2d2fast.errors import BackendError
from r2d2fast.options import CLASS_LOSSES, StepOptions
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


def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    options: StepOptions,
    statistics: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    module = _module()
    size, batch, *_kept = batch_handle(logits, index)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    planes = 1 if statistics is None else module.results
    results = torch.empty(planes * size, dtype=torch.float32, device=logits.device)
    _launch(
        module.step, bank_handle(bank), batch, CLASS_LOSSES.index(options.class_loss),
        *map(_scalar, options.scalars), *options.normalizers(size), options.update,
        grad.data_ptr(), loss.data_ptr(), 0 if statistics is None else statistics.data_ptr(), results.data_ptr(),
        *_target(logits),
    )  # fmt: skip
    return results[:size] if options.reduction == "none" else loss, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    """Rows skipped are not known here, but to ``bank.check()``."""
    module = _module()
    _, batch, *_kept = batch_handle(logits, index)
    _launch(module.predict, bank_handle(bank), batch, *_target(logits))
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


def _scalar(value: float | Tensor) -> tuple[float, int]:
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)


def _target(tensor: Tensor) -> tuple[int, int]:
    device = tensor.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


def _launch(kernel: Any, *arguments: Any) -> None:
    try:
        kernel(*arguments)
    except RuntimeError as error:
        raise BackendError(f"{error}; `{as_called('doctor')}` checks this device") from error
