import multiprocessing

import pytest
import torch
from tiny_run import TINY, train_with_a_checkpoint_each_epoch

from r2d2fast.train import cli


@pytest.fixture(autouse=True)
def one_thread():
    """The same number of threads in every process, and no two processes that wait for each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def start_run():
    """Starts a tiny run in a process of its own, which can be killed: start_run(*arguments)."""
    # A fork server that has imported everything, because importing takes seconds and the runs are short. The first
    # optimizer of a process imports torch._dynamo.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["r2d2fast.train.cli", "torch._dynamo", "pytest"])
    processes = []

    def start(*arguments, target=train_with_a_checkpoint_each_epoch):
        process = context.Process(target=target, args=(list(map(str, arguments)),))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def train_here():
    """Runs the command line of a tiny run in this process; returns its exit status."""
    return lambda *arguments: cli.main([*TINY, *map(str, arguments)])


@pytest.fixture(scope="session")
def finished(tmp_path_factory, start_run):
    """The directory of a tiny run that nothing has interrupted."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    process = start_run("--run-dir", directory)
    process.join()
    assert process.exitcode == 0
    return directory
