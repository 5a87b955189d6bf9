"""What would make the host wait for a GPU, seen on a CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A value read, a size that depends on values, a tensor made of Python numbers, which has to be copied to the device.
WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "scalar_tensor",
}


class NeverWaits(TorchDispatchMode):
    """Raises AssertionError at an operation that waits, and counts the others."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        masks = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor) and one.dtype == torch.bool]
        assert name not in WAITING, f"{name} waits for the device"
        assert not (name == "index.Tensor" and masks), "the size of what a mask selects waits for the device"
        self.calls += 1
        return func(*args, **(kwargs or {}))
