"""Loader processes: order, what they can do to the process that uses them, and their death."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r2d2fast.data import consecutive_batches
from r2d2fast.data.photographs.workers import LoaderError, load_batches
from tests.data.keyed import keyed

ORDER = [keyed(range(3 * batch, 3 * batch + 3), range(100, 103)) for batch in range(7)]


def echo(batch):
    return torch.stack([batch.samples, batch.keys])


def uneven(batch):
    # The first batches take longest: later ones are ready before them.
    time.sleep(0.2 if batch.samples[0] < 6 else 0)
    return batch.samples


def slow(batch):
    time.sleep(0.3)
    return batch.samples


def facts(batch):
    return os.getpid(), torch.get_num_threads()


def failing(batch):
    raise FileNotFoundError("gone.jpg")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_their_order(workers):
    for batch, loaded in zip(ORDER, load_batches(echo, ORDER, workers), strict=True):
        assert torch.equal(loaded, torch.stack([batch.samples, batch.keys]))
    assert [int(index[0]) for index in load_batches(uneven, ORDER, workers)] == list(range(0, 21, 3))


def test_an_empty_order_has_no_batches():
    assert list(load_batches(echo, [], 2)) == []


def test_0_workers_are_this_process_and_each_loads_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(load_batches(facts, ORDER, 0)) == {(os.getpid(), 1)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    pids, threads = zip(*load_batches(facts, ORDER, 2), strict=True)
    assert os.getpid() not in pids
    assert len(set(pids)) == 2
    assert set(threads) == {1}


def test_batches_are_loaded_ahead():
    batches = load_batches(slow, ORDER, 1)
    next(batches)
    time.sleep(1)
    begin = time.perf_counter()
    next(batches)
    assert time.perf_counter() - begin < 0.25


@pytest.mark.parametrize("workers", [0, 2])
def test_no_random_number_of_the_process_is_used(workers):
    before = torch.get_rng_state()
    list(load_batches(echo, ORDER, workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_is_killed_gives_an_error_with_a_way_out_and_interrupts_nothing_else():
    before = signal.getsignal(signal.SIGCHLD)
    batches = load_batches(facts, ORDER, 2)
    pid, _ = next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    time.sleep(0.5)  # PyTorch's own handler would raise here.
    with pytest.raises(LoaderError, match=rf"loader process died .*{pid}.*memory.*fewer --workers; --resume"):
        list(batches)
    assert time.monotonic() - begin < 15


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers inherit nothing here")
def test_a_worker_does_not_destroy_what_it_inherits(tmp_path, monkeypatch):
    """A DALI pipeline, above all, even where PyTorch collects garbage before the worker's first own line."""

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: (gc.collect(), seed(number)))
    gc.disable()  # so that this process does not collect it first
    try:
        Garbage()
        list(load_batches(echo, ORDER, 2))
    finally:
        gc.enable()
    assert os.listdir(tmp_path) == []


def test_what_loading_raises_is_raised():
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
            list(load_batches(failing, ORDER, workers))


def test_an_order_given_up_leaves_no_process():
    batches = load_batches(facts, ORDER, 2)
    pids = {pid for pid, _ in (next(batches), next(batches))}
    batches.close()
    del batches
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_to_all_processes_is_the_trainers_to_hear():
    """Schedulers send it to a whole job; the loader has to go on until the checkpoint is written."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        order = consecutive_batches(torch.arange(40), 1)
        batches = load_batches(_processes, order, workers=2)
        workers = {next(batches) for _ in range(4)}
        everybody = " ".join(map(str, [*workers, os.getpid()]))
        subprocess.run(["sh", "-c", f"kill -TERM {everybody}"], check=True)
        assert len(list(batches)) == 36
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]
    for process in workers:
        assert not Path(f"/proc/{process}").exists()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def _processes(batch):
    return os.getpid()


PROGRAM = """
import multiprocessing, os, subprocess, sys, torch
from r2d2fast.data import consecutive_batches
from r2d2fast.data.photographs.workers import load_batches

def load(batch):
    return os.getpid()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = load_batches(load, consecutive_batches(torch.arange(1000), 1), 2)
    workers = {next(batches) for _ in range(4)}
    subprocess.run(["sh", "-c", "kill -TERM " + " ".join(map(str, workers))], check=True)
    assert {next(batches) for _ in range(20)} == workers
    raise KeyError("nobody catches this")
"""


@pytest.mark.parametrize(
    "method",
    [
        # Processes that are not forked import PyTorch first, one after the other.
        pytest.param(method, marks=[] if method == "fork" else pytest.mark.slow)
        for method in multiprocessing.get_all_start_methods()
    ],
)
def test_workers_end_by_their_program_and_by_nobody_else(tmp_path, method):
    """A scheduler's SIGTERM they outlive, and a program that an exception ends does not wait for them."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", method], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'nobody catches this'")
    assert "leaked" not in done.stderr
