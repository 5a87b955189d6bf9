"""Batches made by loader processes, ahead of the training that uses them."""

import atexit
import gc
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from r2d2fast.data.order import Batch

Loaded = TypeVar("Loaded")
Load = Callable[[Batch], Loaded]


class LoaderError(RuntimeError):
    """A loader process is gone; the message says what to do."""


def load_batches(load: Load[Loaded], order: Sequence[Batch], workers: int, pin: bool = False) -> Iterator[Loaded]:
    """``load(batch)`` for each batch of ``order``, in its order.

    What ``load`` returns can depend on its arguments alone, so it does not depend on the number of workers.

    Args:
        load: called in one of the worker processes, with PyTorch on one thread; what it raises is raised here. Has
            to be picklable where processes are not forked.
        order: the batches.
        workers: processes, each up to two batches ahead; 0: ``load`` is called here, when its batch is asked for.
        pin: whether tensors are put in page-locked memory, from which copies to a GPU are asynchronous.

    Raises LoaderError within about five seconds of the death of a worker.
    """
    loader = DataLoader(
        _Loading(load),
        batch_size=None,
        # Tensors would be lent to the workers by a thread of this process, which complains where one of them ends.
        sampler=[
            (one.samples.numpy(), None if one.keys is None else one.keys.numpy(), one.global_size) for one in order
        ],
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        # The workers' seeds, which nothing here uses, would otherwise be drawn from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    with _child_signal_kept(), _termination_left_to_the_trainer(), _inherited_objects_kept():
        before = set(multiprocessing.active_children())
        batches = iter(loader)
        _workers.update(set(multiprocessing.active_children()) - before)
    while True:
        try:
            loaded = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise LoaderError(
                f"a loader process died ({str(error).strip()}): killed, most often because the machine ran out of memory, or out "
                "of shared memory (/dev/shm). Try fewer --workers; --resume goes on from the last checkpoint"
            ) from error
        yield loaded


class _Loading(Dataset[Loaded], Generic[Loaded]):
    """A data set whose items are batches."""

    def __init__(self, load: Load[Loaded]) -> None:
        self.load = load

    def __getitem__(self, arrays: tuple[np.ndarray, np.ndarray | None, int]) -> Loaded:
        index, keys, global_size = arrays
        batch = Batch(torch.from_numpy(index), None if keys is None else torch.from_numpy(keys), global_size)
        # The operations on one image are too small to share; where other work keeps the cores busy, waiting for each other's
        # threads took most of the time. Workers have one thread anyway.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.load(batch)
        finally:
            torch.set_num_threads(threads)


def _as_it_is(batch: Loaded) -> Loaded:
    return batch


@contextmanager
def _termination_left_to_the_trainer() -> Iterator[None]:
    """Processes that start in the context do not hear SIGTERM, which schedulers send to all processes of a job at once.

    The trainer, which then saves a checkpoint, would find its loader dead: 1 of 4 runs ended without one. Windows sends none.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _inherited_objects_kept() -> Iterator[None]:
    """Processes that are forked in the context do not destroy objects of this one, as their own garbage.

    Collecting the copy of a DALI pipeline, whose threads do not exist in the worker, never ended. In the worker itself it would
    be too late: PyTorch can collect before it calls ``worker_init_fn``.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _begin_worker(_: int) -> None:
    # Not blocked, where the process was not forked: threads that its imports have started would hear it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before Python sends SIGTERM to workers that are left, after an exception that nobody caught, say, and waits for them."""
    for worker in set(multiprocessing.active_children()) & set(_workers):
        worker.kill()


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Keeps PyTorch's handler of SIGCHLD out of the process.

    It would raise in the middle of whatever training does when a worker dies; the loader finds out by itself when it is asked for
    a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield  # Here, and on Windows, PyTorch installs none.
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
