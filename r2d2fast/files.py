"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes ``path`` at the end of the context; after a crash it is the old one or the new one, whole.

    It has a temporary name in the same directory, is synced to the disk and renamed; then the directory is synced. Raises OSError
    where it cannot be written; then, and after any other exception in the context, it is removed and the old one untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)
    sync_directory(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(content)


def sync_directory(directory: Path) -> None:
    """Wait until the names in ``directory`` are on the disk. Windows opens no directory, and has no such wait."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
