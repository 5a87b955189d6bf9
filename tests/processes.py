"""Runs in processes of their own, which can be killed."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess


@contextmanager
def starting(module: str) -> Iterator[Callable[..., BaseProcess]]:
    """Gives start(target, *arguments), which calls ``target`` with the arguments as a list of strings; at the end all are killed.

    A fork server has imported ``module`` and everything that it needs, because importing takes seconds and the runs are short.
    The first optimizer of a process imports torch._dynamo.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "torch._dynamo", "pytest"])
    processes = []

    def start(target, *arguments):
        process = context.Process(target=target, args=(list(map(str, arguments)),))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()
