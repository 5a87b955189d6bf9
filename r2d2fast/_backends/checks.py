"""What every way into a backend checks first."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from r2d2fast.reference import Bank

_INDICES = (torch.int64, torch.int32)


def check_batch(logits: Tensor, index: Tensor, bank: Bank) -> None:
    """TypeError or ValueError unless ``logits`` ``[B, N]`` and ``index`` ``[B]`` fit each other and the bank."""
    check_bank(bank)
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits are a {type(logits).__name__}; pass the network's output, a tensor")
    rows, shape = bank.pseudo_logits, logits.shape
    classes = rows.shape[1]
    if len(shape) != 2 or shape[1] != classes:
        raise ValueError(f"logits are {list(shape)}, but this bank has {classes} classes: pass [B, {classes}]")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; pass the network's floating-point output, before any softmax")
    check_index(index)
    if index.shape != (shape[0],):
        raise ValueError(f"index is {list(index.shape)} for {shape[0]} rows of logits: pass one sample number a row")
    # A device is an object made anew whenever it is asked for.
    all_on_cpu = logits.is_cpu and index.is_cpu and rows.is_cpu
    if not all_on_cpu and (logits.device != rows.device or index.device != rows.device):
        raise ValueError(
            f"logits are on {logits.device}, index on {index.device}, the bank on {rows.device}: "
            f"move them with .to({str(rows.device)!r}), or the bank with bank.to(device)"
        )


def check_bank(bank: Bank) -> None:
    """TypeError for anything that is no bank."""
    if not isinstance(bank, Bank):
        raise TypeError(
            f"bank is a {type(bank).__name__}; pass a PseudoLabelBank, made from the labels of the data set"
        )


def check_index(index: Tensor) -> None:
    """TypeError unless sample numbers are a tensor of int64 or int32."""
    if not isinstance(index, Tensor):
        raise TypeError(
            f"index is a {type(index).__name__}; pass a tensor of int64 or int32, torch.as_tensor(index) say"
        )
    if index.dtype not in _INDICES:
        raise TypeError(f"index is {index.dtype}; pass int64 or int32 sample numbers")


def check_out(out: Tensor, logits: Tensor) -> Tensor:
    """``out`` without its history. TypeError or ValueError unless the gradient of ``logits`` can be written to it."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; pass a tensor like logits, or logits to overwrite them")
    fits = out is logits or (out.shape == logits.shape and out.dtype == logits.dtype and out.device == logits.device)
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype}, {list(out.shape)} with strides {list(out.stride())}, on {out.device}; it must be contiguous, "
            f"{logits.dtype}, {list(logits.shape)}, on {logits.device}: pass torch.empty_like(logits, "
            "memory_format=torch.contiguous_format), or make logits contiguous to overwrite them"
        )
    base = None if is_compiling() else out._base  # which TorchDynamo cannot trace
    for what, leaf in (("a leaf", out), ("a view of a leaf", base)):
        if leaf is not None and leaf.requires_grad and leaf.is_leaf:
            raise ValueError(
                f"the gradient would be written over {what} that requires one, which autograd must know as it is: "
                "leave inplace=True out, or pass out=tensor.detach() where nothing needs that tensor's values any more"
            )
    return out.detach() if out.requires_grad else out


def check_memory(out: Tensor, logits: Tensor, index: Tensor, bank: Bank, statistics: Tensor | None) -> None:
    """ValueError where ``out``, which :func:`check_out` has passed, is neither ``logits`` nor memory of its own."""
    begin = out.data_ptr()
    end = begin + out.nbytes
    for name, other in (
        ("the bank's rows", bank.pseudo_logits),
        ("the bank's slots", bank.slots),
        ("the bank's counter", bank.updates),
        ("the bank's status", bank.status),
        ("index", index),
        ("the statistics", statistics),
        ("a part of logits", None if begin == logits.data_ptr() and logits.is_contiguous() else logits),
    ):
        if other is not None and (first := other.data_ptr()) < end and begin < first + _extent(other):
            raise ValueError(
                f"out shares memory with {name}, which the step reads or writes while it writes the gradient: pass "
                "torch.empty_like(logits), or logits itself, contiguous and in memory of its own, to overwrite it"
            )


def _extent(tensor: Tensor) -> int:
    """How many bytes there are from the first of a tensor to its last, gaps included."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def apart(logits: Tensor, bank: Bank) -> Tensor:
    """``logits`` in memory of their own, should they be rows of the bank: a kernel writes one row before it reads another."""
    shared = logits.untyped_storage().data_ptr() == bank.pseudo_logits.untyped_storage().data_ptr()
    return logits.clone() if shared else logits
