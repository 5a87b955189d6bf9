"""Tensors at the edge of memory: for code that the harness does not watch, one byte too far is a segmentation fault."""

import ctypes
import mmap

import torch


def guarded(tensor: torch.Tensor, edge: str = "end") -> torch.Tensor:
    """A contiguous copy that ends at an inaccessible page (and is aligned as its size lets it) or, "start", begins at one."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inside = -(-size // page) * page or page
    memory = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    for guard in (address, address + page + inside):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), no_access):
            raise OSError(ctypes.get_errno(), "mprotect")
    data = torch.frombuffer(memory, dtype=torch.uint8, count=inside, offset=page)
    data = data[inside - size :] if edge == "end" else data[:size]
    return data.view(tensor.dtype).view(tensor.shape).copy_(tensor)
