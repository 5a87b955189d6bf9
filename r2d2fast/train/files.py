"""The files of a run, and what is said where one cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2d2fast.files import replace_file
from r2d2fast.train.errors import TrainingError

CURRENT = "checkpoint"
PREVIOUS = "checkpoint.previous"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a TrainingError that names ``path`` and the way out."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror}. Free some space, mend its permissions, or name another --run-dir. "
            + said_of_checkpoints(path)
        ) from error


def said_of_checkpoints(path: Path) -> str:
    """What a checkpoint beside the file ``path``, or around it, is good for, if there is one."""
    run = next(
        (one for one in list(path.parents)[:2] if any((one / name).exists() for name in (CURRENT, PREVIOUS))), None
    )
    if run is None:
        return "There is no checkpoint to go on from: --resume begins anew."
    return f"Checkpoints written before, in {run}, are good: --resume goes on from them."


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all. Raises TrainingError, with the old file untouched."""
    with writing(path):
        replace_file(path, content)
