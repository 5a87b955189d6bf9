"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a crash or a full disk leaves either the old file or the new one, whole.

    The content goes to a temporary file in the same directory, is synced to the disk and renamed; then the directory is
    synced. Raises OSError, with the temporary file removed and the old one untouched, where the content cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
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
