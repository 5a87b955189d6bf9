"""How many CPU threads a run takes: by the work of a step, or as it is told, and to its end the same."""

import json
from dataclasses import replace

import pytest
import torch
from small_data import CONFIG, Calling, assert_same_run, make_trainer, trainer_after

from r2d2fast.models import make_model
from r2d2fast.train import state
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.threads import choose_threads, cpu_threads


@pytest.mark.parametrize(
    ("backbone", "shape", "batch", "suited"),
    [
        # The recipes of the digits, MNIST, Fashion-MNIST, and SVHN's of stage 1; 0.31, 0.83, 3.8 and 1460 MFLOP an image.
        ("small", (1, 8, 8), 128, 1),
        ("lenet2d", (1, 28, 28), 512, 1),
        ("small", (1, 28, 28), 512, 9),
        ("convlarge", (3, 32, 32), 100, 64),
    ],
)
def test_threads_are_those_that_the_work_of_a_step_suits(backbone, shape, batch, suited):
    model = make_model(backbone, 10, shape[0], shape[1])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with cpu_threads(64):
        assert choose_threads(model, shape, batch) == suited
    with cpu_threads(2):  # of OMP_NUM_THREADS or torchrun
        assert choose_threads(model, shape, batch) == min(suited, 2)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def threads_of_each_moment(trainer):
    """While an epoch is computed."""
    seen = set()
    trainer.callback = Calling(lambda: seen.add(torch.get_num_threads()))
    with cpu_threads(2):  # of the program around it, which keeps them
        trainer.run_epoch()
        assert torch.get_num_threads() == 2
    return seen


def test_an_epoch_is_computed_with_the_threads_of_the_run():
    for asked, taken in ((0, 1), (1, 1), (3, 3)):
        assert threads_of_each_moment(make_trainer(replace(CONFIG, threads=asked))) == {taken}
    with pytest.raises(ConfigError, match="--threads -1: must be at least 0"):
        make_trainer(replace(CONFIG, threads=-1))


def test_a_resumed_run_keeps_the_threads_with_which_it_began():
    begun = trainer_after(1, replace(CONFIG, threads=2))
    values = json.loads(json.dumps(state.values(begun)))
    for asked in (0, 2):
        resumed = make_trainer(replace(CONFIG, threads=asked))
        state.load_values(resumed, values)
        assert threads_of_each_moment(resumed) == {2}
    with pytest.raises(
        ConfigError, match="--threads 1: this run began with 2, on which its results depend; go on without"
    ):
        state.load_values(make_trainer(replace(CONFIG, threads=1)), values)
    # On another number of ranks results are not the same bits in any case.
    values["ranks"] = 2
    other = make_trainer(replace(CONFIG, threads=1))
    state.load_values(other, values)
    assert other.threads == 1


def test_a_run_says_what_it_has_chosen(tmp_path, train_here, capsys, monkeypatch):
    directory = tmp_path / "run"
    flags = ("--stages", 1, "--run-dir", directory)
    monkeypatch.setattr("r2d2fast.train.threads.WORK_OF_A_THREAD", 1.0)
    torch.set_num_threads(2)
    assert train_here(*flags) == 0
    assert "2 CPU threads, by the work of a step\n" in capsys.readouterr().out
    assert json.loads((directory / "results.json").read_text())["machine"]["threads"] == 2
    torch.set_num_threads(1)
    (directory / "results.json").unlink()
    assert train_here(*flags, "--threads", 1, "--resume") == 2
    assert "--threads 1: this run began with 2" in capsys.readouterr().err
    assert train_here(*flags, "--resume") == 0
    assert "2 CPU threads\n" in capsys.readouterr().out
    assert train_here("--stages", 1, "--threads", 1, "--run-dir", tmp_path / "other") == 0
    assert "1 CPU thread\n" in capsys.readouterr().out


def test_a_given_number_is_that_of_any_environment():
    """The same bits whatever PyTorch had: here one thread, there two."""
    with cpu_threads(1):
        here = trainer_after(1, replace(CONFIG, threads=2))
    with cpu_threads(2):
        there = trainer_after(1, replace(CONFIG, threads=2))
    assert_same_run(here, there)
