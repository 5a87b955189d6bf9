"""The files of a run, and what is said where one cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2d2fast.files import replace_file
from r2d2fast.train.errors import TrainingError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a TrainingError that names ``path`` and the way out."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror}. Free some space, mend its permissions, or name another --run-dir. "
            "Checkpoints written before are good: --resume goes on from them."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all. Raises TrainingError, with the old file untouched."""
    with writing(path):
        replace_file(path, content)
