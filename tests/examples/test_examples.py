"""The examples, each run by its framework's own trainer: killed, resumed, on two processes, accumulated, in mixed precision."""

import os
import random
import signal
import socket
import time

import pytest
import torch

from r2d2fast.examples import ddp
from r2d2fast.train import cli
from tests.examples.running import run
from tests.processes import starting

FRAMEWORKS = [pytest.param(name, marks=pytest.mark.extra(name)) for name in ("lightning", "accelerate", "transformers")]
SHORT = ("--stage1-epochs=5", "--epochs=4")
# What is there when the first checkpoint is whole.
CHECKPOINTS = {
    "ddp": "checkpoint.pt",
    "lightning": "last.ckpt",
    "accelerate": "epoch-*",
    "transformers": "checkpoint-*/criterion.pt",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start():
    os.environ["OMP_NUM_THREADS"] = "1"
    with starting("tests.examples.running") as start:
        yield lambda *arguments: start(run, *arguments)


@pytest.fixture
def train(start, tmp_path):
    """Runs an example to its end, or kills it so many seconds after its first checkpoint; what each process has at the end."""

    def train(name, processes=1, flags=(), directory="run", kill_at=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = [tmp_path / f"{directory}-{rank}.pt" for rank in range(processes)]
        arguments = (name, "--directory", tmp_path / directory, *SHORT, *flags)
        ranks = [start(rank, processes, port, result, *arguments) for rank, result in enumerate(results)]
        if kill_at is not None:
            while not list((tmp_path / directory).glob(CHECKPOINTS[name])) and all(one.is_alive() for one in ranks):
                time.sleep(0.005)
            time.sleep(kill_at)
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join(240)
        assert [one.exitcode for one in ranks] == [0 if kill_at is None else -signal.SIGKILL] * processes
        return None if kill_at is not None else [torch.load(result, weights_only=True) for result in results]

    return train


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_trains_as_the_plain_loop_does(name, train):
    """To the last bit: so that whatever error the plain loop has is theirs, too."""
    (expected,) = train("ddp", directory="plain")
    (ours,) = train(name)
    assert_equal(ours, expected)
    assert expected["rows"].std() > 0.1


@pytest.mark.parametrize("name", ["ddp", *FRAMEWORKS])
def test_killed_and_resumed_is_as_never_killed_with_the_bank_intact(name, train):
    """Two processes, four batches accumulated for each step, mixed precision."""
    setting = (name, 2, ("--accumulate=4", "--bf16"))
    expected = train(*setting, "whole")
    train(*setting, "killed", kill_at=random.Random(name).uniform(0, 0.1))
    for ours, whole in zip(train(*setting, "killed"), expected, strict=True):
        assert_equal(ours, whole)
    # Each process has the rows of samples of its own, and together they have all; the network is the same on both.
    own = torch.cat([one["own"] for one in expected])
    assert len(own) == len(own.unique()) == 1387
    assert torch.equal(expected[0]["7.weight"], expected[-1]["7.weight"])


def test_the_plain_loop_is_as_good_as_our_own_trainer(tmp_path, one_thread, capsys):
    """Mean over three seeds, stage 2 of 24 epochs, within a point."""
    theirs, ours = [], []
    schedule = ("--stage2.epochs=24", "--stage2.repredict-epochs=12,15,18,21")
    for seed in range(3):
        ddp.main(["--directory", str(tmp_path / f"plain{seed}"), f"--seed={seed}", "--epochs=24"])
        theirs.append(float(capsys.readouterr().out.split()[2]))
        directory = tmp_path / f"own{seed}"
        flags = (f"--seed={seed}", "--stages=1,2", "--threads=1", *schedule, f"--run-dir={directory}")
        assert cli.main(list(flags)) == 0
        ours.append(float(capsys.readouterr().out.split("test error ")[2].split()[0]))
    assert abs(sum(theirs) - sum(ours)) / 3 <= 1.0, (theirs, ours)
