"""Ctrl-C before a command has begun."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def quietly_interrupted(program: str) -> Iterator[None]:
    """While the context lasts, in which a command imports what it needs, Ctrl-C ends the process with one line and status 130.

    Where a KeyboardInterrupt is raised within an import, whoever imports may hide it, or print a traceback of many pages.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(130)

    # Started with nohup, say, a process ignores it; and only the main thread may set it.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
