"""Captured steps on a CPU, where a tape stands in for CUDA graphs: the same run, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from r2d2fast import R2D2Classifier
from r2d2fast.models.backbones import BACKBONES
from r2d2fast.train import captured_steps
from r2d2fast.train import trainer as trainer_module
from r2d2fast.train.captured_steps import CapturedStep, StepTable, check_cuda_graphs
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.methods import Method
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.schedule import Epoch
from tests.blobs import blobs, few
from tests.cases import slow_but
from tests.train import small_data
from tests.train.small_data import (
    CONFIG,
    CPU,
    EPOCHS,
    STEPS,
    WITH_DROPOUT,
    Calling,
    assert_same_run,
    embeddings,
    loaded,
    make_trainer,
    saved,
)
from tests.train.tape import Tape, capture


@pytest.fixture
def tapes(monkeypatch):
    """All tapes made; every kind of step is captured when it has been taken once. The network has dropout."""
    made = []
    monkeypatch.setitem(BACKBONES, "small", WITH_DROPOUT)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(captured_steps, "WARM_UP", 1)
    monkeypatch.setattr(trainer_module, "check_cuda_graphs", lambda *_: None)
    return made


def never_captured(config, monkeypatch):
    """A whole run of the same steps, none of which is captured."""
    with monkeypatch.context() as patch:
        patch.setattr(captured_steps, "WARM_UP", STEPS)
        trainer = make_trainer(config)
        trainer.fit()
    return trainer


STAGE2 = replace(CONFIG.stage2, lr_schedule="cosine", distribution_alignment=True, weight_decay=0.01)
SETTINGS = {
    "as they are": {},
    "a last batch that is smaller": {"stage3": replace(CONFIG.stage3, batch=50)},
    "averaged weights": {"ema": 0.9, "stage2": STAGE2},
    "AdamW": {"optimizer": "adamw"},
    "cutout and noise": {"cutout": 4, "precision": "bfloat16"},
    "pseudo-labels": {"stage3": replace(CONFIG.stage3, hard_labels="pseudo")},
    "fixmatch": {"method": "fixmatch", "stages": (1, 2), "stage2": replace(STAGE2, repredict_epochs=(), lrs=(0.1,))},
}


@pytest.mark.parametrize("setting", slow_but(SETTINGS, {"as they are", "averaged weights"}))
def test_a_run_of_captured_steps_is_the_same_run(tapes, monkeypatch, setting):
    # Learning rates in float32, as a GPU has them, captured or not.
    monkeypatch.setattr(Epoch, "lr", lambda epoch, step, lr=Epoch.lr: torch.tensor(lr(epoch, step)).item())
    expected, trainer = (make_trainer(replace(CONFIG, cuda_graphs=on, **SETTINGS[setting])) for on in (False, True))
    expected.fit()
    assert tapes == []
    trainer.fit()
    assert_same_run(trainer, expected)
    # One of stage 1, one of stage 2 before the reprediction and one after it, one of stage 3.
    assert len(tapes) == (2 if "method" in SETTINGS[setting] else 4)
    assert all(tape.replays for tape in tapes)


def test_each_replay_leaves_out_other_features(tapes, monkeypatch):
    data, changes = embeddings()
    monkeypatch.setattr(small_data, "dataset", lambda device: data)
    config = replace(CONFIG, cuda_graphs=True, **changes)
    trainer = make_trainer(config)
    trainer.fit()
    assert len(tapes) == 4
    assert_same_run(trainer, never_captured(config, monkeypatch))


def test_an_estimator_s_fit_is_the_same(tapes, monkeypatch):
    def probabilities():
        x, y = blobs()
        return R2D2Classifier(cuda_graphs=True, random_state=0, device="cpu").fit(x, few(y)).label_distributions_

    captured = probabilities()
    assert tapes
    made = len(tapes)
    monkeypatch.setattr(captured_steps, "WARM_UP", 10**6)
    np.testing.assert_array_equal(captured, probabilities())
    assert len(tapes) == made


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("epoch", "step"), [*((epoch, 1) for epoch in range(EPOCHS)), (6, 2)])
def test_a_resumed_run_of_captured_steps_is_the_same_run(tapes, monkeypatch, epoch, step):
    config = replace(CONFIG, cuda_graphs=True, stage3=replace(CONFIG.stage3, batch=50))  # of which the last has 20
    begun = make_trainer(config)

    def stop():
        if begun.position == (epoch, step):
            raise Stopped

    begun.callback = Calling(stop)
    with pytest.raises(Stopped):
        begun.fit()
    resumed = loaded(config, saved(begun))
    resumed.fit()
    assert_same_run(resumed, never_captured(config, monkeypatch))


def test_the_host_makes_no_batch_of_images_that_are_on_the_device(tapes, monkeypatch):
    monkeypatch.setattr(Method, "views", None)
    make_trainer(replace(CONFIG, cuda_graphs=True)).fit()
    assert len(tapes) == 4


def _same_number(captured, given):
    captured.graph.replay()


def _first_epoch_only(table, first, batches, lrs, shares, fill=StepTable.fill):
    fill(table, first, table.__dict__.setdefault("batches", batches), lrs, shares)


def _first_rate(table, number, size, row=StepTable.row):
    samples, keys, lr, share = row(table, number, size)
    return samples, keys, table.__dict__.setdefault("lr", lr.detach().clone()), share


PLANTED = {
    "every step has the number of the first": (CapturedStep, "replay", _same_number),
    "every epoch has the batches of the first": (StepTable, "fill", _first_epoch_only),
    "every step has the learning rate of the first": (StepTable, "row", _first_rate),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_step_that_does_not_read_what_is_its_own_would_be_noticed(tapes, monkeypatch, planted):
    config = replace(CONFIG, cuda_graphs=True, stages=(1,), stage1=replace(CONFIG.stage1, batch=2))
    expected = never_captured(config, monkeypatch)
    monkeypatch.setattr(*PLANTED[planted])
    trainer = make_trainer(config)
    trainer.fit()
    with pytest.raises(AssertionError):
        assert_same_run(trainer, expected)


def test_no_share_of_the_network_is_told(tapes):
    trainer = make_trainer(replace(CONFIG, cuda_graphs=True))
    assert trainer.run_epoch()["outside_network"] is None


def test_a_step_that_cannot_be_captured_names_the_way_out(tapes, monkeypatch):
    def graph(tape, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    told = "not permitted when stream is capturing; go on in a new process without cuda_graphs"
    with pytest.raises(TrainingError, match=told):
        make_trainer(replace(CONFIG, cuda_graphs=True)).fit()
    x, y = blobs()
    with pytest.raises(RuntimeError, match=told):
        R2D2Classifier(cuda_graphs=True, random_state=0).fit(x, few(y))


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("ranks", "changes", "precision", "message"),
    [
        (Ranks(device=CPU), {}, "float32", "needs a GPU; leave it out on a CPU"),
        (Ranks(count=2, device=GPU), {}, "float32", "is for one process; leave it out under torchrun"),
        (
            Ranks(device=GPU),
            {"compile": True},
            "float32",
            "and --compile, which has CUDA graphs of its own: give one of them",
        ),
        (Ranks(device=GPU), {}, "float16", "cannot be in float16, the precision of GPUs without bfloat16"),
        (
            Ranks(device=GPU),
            {"method": "vat"},
            "float32",
            "and --method vat, whose loss changes from step to step; accepted: r2d2, supervised, fixmatch",
        ),
    ],
)
def test_what_forbids_it_is_said(ranks, changes, precision, message):
    with pytest.raises(ConfigError, match=f"^--cuda-graphs {message}"):
        check_cuda_graphs(replace(CONFIG, cuda_graphs=True, **changes), ranks, Precision(precision, CPU))


def test_it_is_accepted_where_nothing_forbids_it():
    check_cuda_graphs(replace(CONFIG, cuda_graphs=True), Ranks(device=GPU), Precision("bfloat16", CPU))
