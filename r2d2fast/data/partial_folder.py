"""Folders that appear only when all of them is on the disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from r2d2fast.data.errors import DataError
from r2d2fast.files import sync_directory


@contextmanager
def partial_folder(dest: Path, resumable: bool = False) -> Iterator[Path]:
    """A folder that becomes ``dest`` if the block comes to its end.

    It is ``dest`` + ``.partial``: new, and removed if the block does not come to its end; ``resumable``: with what an earlier
    process left in it, and left there. Raises DataError if another process is writing it, or it cannot be written.
    """
    partial = dest.with_name(dest.name + ".partial")
    with writing(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(dest.with_name(dest.name + ".lock"), blocking=False)
        try:
            lock.acquire()  # of the process, so that one that is killed lets it go
        except Timeout:
            raise DataError(f"another process is writing to {dest}; wait for it, or name another destination") from None
    try:
        with writing(dest):
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=resumable)
        yield partial
        with writing(dest):
            os.rename(partial, dest)
            sync_directory(dest.parent)
    finally:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(PermissionError):  # Windows keeps the name of a file that is open
            os.unlink(lock.lock_file)
        lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a DataError that names ``path`` and says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}. Free some space or mend its permissions, or name another destination"
        ) from error
