import pytest
import torch
from tiny_run import TINY, train_with_a_checkpoint_each_epoch

from r2d2fast.train import checkpoint, cli
from tests.processes import starting


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The same number of threads in every process, and no two processes that wait for each other's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start_run():
    """Starts a tiny run in a process of its own, which can be killed: start_run(*arguments)."""
    with starting("r2d2fast.train.command") as start:
        yield lambda *arguments, target=train_with_a_checkpoint_each_epoch: start(target, *arguments)


@pytest.fixture
def train_here():
    """Runs the command line of a tiny run in this process; returns its exit status."""
    return lambda *arguments: cli.main([*TINY, *map(str, arguments)])


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of a tiny run that nothing has interrupted, with a checkpoint of each epoch."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(checkpoint, "CHECKPOINT_SHARE", 0)
        assert cli.main([*TINY, "--threads=1", f"--run-dir={directory}"]) == 0
    return directory
