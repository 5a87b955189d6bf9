"""The Triton kernels on the tensors' device and PyTorch's current stream; nothing here waits for them.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run in its interpreter, on CPU tensors, for tests.
"""

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from r2d2fast._backends.common import STATISTICS, BackendStatus, address_of, unsupported_dtype
from r2d2fast.options import StepOptions
from r2d2fast.reference import Bank


def status() -> BackendStatus:
    problem = _problem()
    if problem is not None:
        return BackendStatus(False, problem)
    if _interpreted():
        return BackendStatus(True, f"{_version()} in its interpreter on CPU tensors, for tests (TRITON_INTERPRET=1)")
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return BackendStatus(True, f"{_version()} on CUDA tensors (devices here: {devices})")


def why_not(logits: Tensor, rows: Tensor) -> str | None:
    problem = _problem()
    if problem is not None:
        return problem
    wanted = "cpu" if _interpreted() else "cuda"
    if logits.device.type != wanted:
        return f"the logits are on {logits.device}; these kernels are for {wanted.upper()} tensors"
    return unsupported_dtype(logits, rows)


def step(
    logits: Tensor,
    index: Tensor,
    bank: Bank,
    options: StepOptions,
    statistics: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from r2d2fast.kernels.step import step

    size = logits.shape[0]
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    planes = 1 if statistics is None else 1 + len(STATISTICS)
    results = torch.empty(planes * size, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        step(
            _rows(logits), index.contiguous(), bank, grad, loss, results, statistics,
            tuple(map(_scalar, options.scalars)), tuple(map(float, options.normalizers(size))),
            options.class_loss, options.update,
        )  # fmt: skip
    return results[:size] if options.reduction == "none" else loss, grad


def predict(bank: Bank, index: Tensor, logits: Tensor) -> tuple[int, int]:
    """Rows skipped are not known here, but to ``bank.check()``."""
    from r2d2fast.kernels.predict import predict

    with torch.cuda.device_of(logits):
        predict(_rows(logits), index.contiguous(), bank.pseudo_logits, bank.slots, bank.status)
    return 0, -1


def scale_gradient(grad: Tensor, grad_output: Tensor, grad_scale: float | Tensor, keep: bool) -> Tensor:
    from r2d2fast.kernels.scale import scale

    if address_of(grad_output) == 0:
        return grad * (grad_output / grad_scale)
    # In place, so that a factor of 1 costs nothing, unless a second backward will want what forward has saved.
    out = torch.empty_like(grad) if keep else grad
    with torch.cuda.device_of(grad):
        scale(out, grad, grad_output, _scalar(grad_scale))
    return out


@functools.cache
def _triton() -> ModuleType:
    import triton  # the package: imports here are absolute

    return triton


@functools.cache
def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if importlib.util.find_spec("r2d2fast.kernels") is None:
        return (
            "r2d2fast.kernels is not installed, as in a checkout that is only on the path; run `pip install -e .` in it"
        )
    try:
        _triton()
    except ImportError as error:
        return f"triton is installed, but does not load ({error})"
    if not _interpreted() and not torch.cuda.is_available():
        return f"{_version()} is installed, but PyTorch finds no GPU here"
    return None


@functools.cache
def _interpreted() -> bool:
    from r2d2fast.kernels.scale import scale_kernel

    return not isinstance(scale_kernel, _triton().JITFunction)


def _version() -> str:
    return f"Triton {_triton().__version__}"


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _scalar(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return value
    # An int would have a type of its own. The interpreter gives a number none at all, so that there it goes in as a tensor.
    return torch.tensor(float(value)) if _interpreted() else float(value)
