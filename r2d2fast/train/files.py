"""Files that are whole or not there, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Write ``content`` to ``path`` so that a crash or a full disk leaves either the old file or the new one, whole.

    The content goes to a temporary file in the same directory, is synced to the disk and renamed; then the directory is
    synced. Raises TrainingError, with the temporary file removed and the old one untouched, where the content cannot be
    written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the names in ``directory`` are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
