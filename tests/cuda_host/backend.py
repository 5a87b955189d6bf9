"""The backend `cuda` of r2d2fast on CPU tensors: its Python code and its kernels as they are, in the harness."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from r2d2fast._backends import cuda, native
from r2d2fast._backends.common import unsupported_dtype
from tests.cuda_host.host import Host, Report

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [CSRC / "d2_cuda.cu", CSRC / "binding_cuda.cpp"]
DEFINES = {"R2D2_CUDA_ARCHS": "80,90"}

# The harness counts accesses element by element, and keeps nothing for a bank of 2^31.
WATCHED_ELEMENTS = 2**26


class _Allocations:
    """torch, as cuda.py sees it: what it allocates is watched, too."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        made = getattr(torch, name)
        if not name.startswith("empty"):
            return made

        def allocate(*args: Any, **options: Any) -> Tensor:
            tensor = made(*args, **options)
            if tensor.is_floating_point():
                tensor.fill_(12345.0)  # neither zeros nor NaN may pass for something that was written
            self._given[f"allocation {len(self._given)}"] = tensor
            return tensor

        return allocate


@contextmanager
def on_the_host(host: Host, order: str) -> Iterator[list[Report]]:
    """Within it, backend="cuda" takes CPU tensors; yields the reports of the launches, one each."""
    given: dict[str, Tensor] = {}
    reports: list[Report] = []
    original = {
        name: getattr(cuda, name) for name in ("batch_handle", "bank_handle", "_scalar", "_launch", "scale_gradient")
    }

    def batch(logits: Tensor, index: Tensor) -> Any:
        size, made, *kept = original["batch_handle"](logits, index)
        given.update(zip(("logits", "index"), kept, strict=True))
        return size, made, *kept

    def bank(of: Any) -> Any:
        rows = of.pseudo_logits
        padded = rows.as_strided((rows.shape[0], rows.stride(0)), (rows.stride(0), 1)) if len(rows) else rows
        given.update(pseudo_logits=padded, slots=of.slots, updates=of.updates, status=of.status)
        return original["bank_handle"](of)

    def scalar(value: float | Tensor) -> Any:
        if isinstance(value, Tensor):
            given[f"scalar {len(given)}"] = value
        return original["_scalar"](value)

    def scale_gradient(grad: Tensor, grad_output: Tensor, *args: Any) -> Tensor:
        given.update(grad=grad, grad_output=grad_output)
        try:
            return original["scale_gradient"](grad, grad_output, *args)
        finally:
            given.clear()

    def step(
        logits: Tensor, index: Tensor, of: Any, options: Any, statistics: Tensor | None, out: Tensor | None = None
    ) -> Any:
        if statistics is not None:
            given["statistics"] = statistics
        if out is not None:
            given["out"] = out
        return original_step(logits, index, of, options, statistics, out)

    def launch(kernel: Any, *arguments: Any) -> None:
        checks = all(tensor.numel() < WATCHED_ELEMENTS for tensor in given.values())
        if "out" in given and given["out"].data_ptr() == given["logits"].data_ptr():
            del given["logits"]  # one tensor under one name: the step overwrites it
        constants = {name: given[name] for name in ("logits", "index", "slots", "grad_output") if name in given}
        buffers = {name: tensor for name, tensor in given.items() if name not in constants}
        given.clear()
        with host.launches(order, seed=len(reports), buffers=buffers, constants=constants, checks=checks) as report:
            reports.append(report)
            original["_launch"](kernel, *arguments)

    original_step = cuda.step
    with (
        mock.patch.multiple(
            cuda,
            torch=_Allocations(given),
            why_not=unsupported_dtype,
            _target=lambda tensor: (0, 0),
            batch_handle=batch,
            bank_handle=bank,
            _scalar=scalar,
            _launch=launch,
            scale_gradient=scale_gradient,
            step=step,
        ),
        mock.patch.object(native, "cuda", native.Library(host.module, None)),
    ):
        yield reports
