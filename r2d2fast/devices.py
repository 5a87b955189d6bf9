"""The device that a command line names."""

import torch


def find_device(name: str) -> torch.device:
    """The device of ``--device``; auto is cuda where there is a GPU, else cpu.

    Raises ValueError, with the names accepted on this machine, for one that is not there, cannot be used, or has no kernels here.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    accepted = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    reason = "no such device"
    if name in accepted:
        try:
            return torch.empty(0, device=name).device  # with its number, without which it would equal no tensor's
        except RuntimeError as error:  # of a GPU that another process has to itself, say
            reason = str(error).splitlines()[0]
    no_gpu = "" if gpus else "; PyTorch finds no GPU, and python -m r2d2fast.doctor says why"
    raise ValueError(f"--device {name}: {reason}; accepted here: {', '.join(accepted)}{no_gpu}")
