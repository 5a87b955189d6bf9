"""What stopped a command, where it is no error of the program: the sentence in place of a traceback."""

import torch

from r2d2fast.data import DataError, LoaderError

# PyTorch raises a plain RuntimeError where the CPU's memory is at its end.
_CPU_MEMORY = ("can't allocate memory", "not enough memory")
LESS_MEMORY = (
    "out of memory ({}). A smaller --stage1.batch, --stage2.unlabelled-batch, --stage2.labelled-batch or --stage3.batch takes "
    "less of it, as do a smaller --image-size, --bank-dtype bfloat16, and --bank-storage with pinned (on a GPU) or a file (on a "
    "CPU); --dry-run says what each takes"
)


def in_words(error: Exception) -> str | None:
    """What to tell the user, of an image that is damaged, say, a loader process that died, or no memory left; else None."""
    if isinstance(error, DataError | LoaderError):
        return str(error)
    if is_out_of_memory(error):
        return LESS_MEMORY.format((str(error).splitlines() or ["MemoryError"])[0])
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the CPU or a GPU was not enough."""
    of_cpu = isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_MEMORY)
    return of_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)
