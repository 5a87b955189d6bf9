"""What every way into a backend checks first."""

import torch
from torch import Tensor

from r2d2fast.reference import Bank


def check_batch(logits: Tensor, index: Tensor, bank: Bank) -> None:
    """TypeError or ValueError unless ``logits`` ``[B, N]`` and ``index`` ``[B]`` fit each other and the bank."""
    check_bank(bank)
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits are a {type(logits).__name__}; pass the network's output, a tensor")
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
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index is {index.dtype}; pass int64 or int32 sample numbers")


def apart(logits: Tensor, bank: Bank) -> Tensor:
    """``logits`` in memory of their own, should they be rows of the bank: a kernel writes one row before it reads another."""
    shared = logits.untyped_storage().data_ptr() == bank.pseudo_logits.untyped_storage().data_ptr()
    return logits.clone() if shared else logits
