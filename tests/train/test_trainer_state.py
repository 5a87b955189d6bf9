"""A run depends on nothing random but its seed, and on nothing that its state does not hold."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from r2d2fast.models import make_model
from r2d2fast.train import evaluation, state
from tests.train import small_data
from tests.train.small_data import (
    CONFIG,
    EPOCHS,
    EVALUATIONS,
    STEPS,
    Calling,
    assert_same_run,
    embeddings,
    loaded,
    make_trainer,
    saved,
    trainer_after,
)


@pytest.fixture
def dropout(monkeypatch):
    """A network with random numbers in it, as ConvLarge and Shake-Shake have them."""

    def make(*arguments, **options):
        network = make_model(*arguments, **options)
        return nn.Sequential(*network[:-1], nn.Dropout(0.3), network[-1])

    monkeypatch.setattr("r2d2fast.train.build.make_model", make)


@pytest.mark.usefixtures("dropout")
def test_training_depends_on_its_seed_and_on_no_random_state_but_its_own():
    first = trainer_after(EPOCHS)
    torch.manual_seed(777)
    second = make_trainer()
    torch.manual_seed(888)
    second.callback = Calling(lambda: torch.rand(3))  # others draw between the steps
    second.fit()
    assert_same_run(first, second)
    other = trainer_after(3, replace(CONFIG, seed=1))
    assert all(row["train_loss"] != one["train_loss"] for row, one in zip(first.history, other.history, strict=False))


class Stopped(Exception):
    pass


def stopped_at(moment, config):
    """The state at that moment between steps of a run, from 0, and where it is; None if there are not so many."""
    trainer = make_trainer(config)
    passed = itertools.count()

    def stop():
        if next(passed) == moment:
            raise Stopped

    trainer.callback = Calling(stop)
    try:
        trainer.fit()
    except Stopped:
        return saved(trainer), trainer.position
    return None


KINDS = {
    "float32": {},
    "bank of 16 bits": {"bank_dtype": "bfloat16"},
    "pseudo-labels kept for stage 3": {"stage3": replace(CONFIG.stage3, hard_labels="pseudo")},
    "float16": {"precision": "float16"},
    "AdamW and averaged weights": {"optimizer": "adamw", "ema": 0.9},
}
# At first: steps are skipped until it has come down, in stage 2.
OVERFLOWING = 2.0**26


@pytest.mark.usefixtures("dropout")
@pytest.mark.parametrize(
    ("kind", "every"),
    [
        *(pytest.param(kind, 1 if kind == "float32" else 5, marks=pytest.mark.slow) for kind in KINDS),
        *(("float32", 13), *((kind, 37) for kind in list(KINDS)[1:])),
    ],
)
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(kind, every, monkeypatch):
    """At every step, and in the middle of every prediction and evaluation, which are made in batches of 32 here."""
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 32)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=OVERFLOWING))
    config = replace(CONFIG, **KINDS[kind])
    whole = trainer_after(EPOCHS, config)
    # A scale that overflows at first comes down, and the network learns.
    assert kind != "float16" or 1 < whole.precision.scaler.get_scale() < OVERFLOWING
    assert kind != "float16" or whole.history[-1]["test_error"] < whole.history[1]["test_error"]
    places = []
    for moment in itertools.count(0, every):
        stopped = stopped_at(moment, config)
        if stopped is None:
            break
        before, place = stopped
        places.append(place)
        resumed = loaded(config, before)
        assert resumed.position == place
        resumed.fit()
        assert_same_run(resumed, whole)
    predictions = 3 if kind != "pseudo-labels kept for stage 3" else 2
    moments = STEPS + 4 * predictions + 2 * EVALUATIONS
    assert len(places) == -(-moments // every)
    if every == 1:
        steps = {(epoch.stage, epoch.epoch): epoch.steps for epoch in whole.schedule}
        assert set(places) >= {(n, step) for n, count in enumerate(steps.values()) for step in range(1, count + 1)}


def test_a_resumed_run_leaves_out_the_same_features(monkeypatch):
    data, changes = embeddings()
    monkeypatch.setattr(small_data, "dataset", lambda device: data)
    config = replace(CONFIG, **changes)
    whole = trainer_after(EPOCHS, config)
    without = trainer_after(1, replace(config, dropout=0.0))
    assert without.history[0]["train_loss"] != whole.history[0]["train_loss"]
    for moment in (1, 9, 30):
        before, _ = stopped_at(moment, config)
        torch.manual_seed(999)
        resumed = loaded(config, before)
        resumed.fit()
        assert_same_run(resumed, whole)


@pytest.mark.usefixtures("dropout")
def test_saving_changes_nothing():
    whole, often = trainer_after(EPOCHS), make_trainer()
    often.callback = Calling(lambda: saved(often))
    often.fit()
    assert_same_run(often, whole)


def test_seconds_of_an_epoch_include_those_before_it_was_stopped_and_images_per_second_do_not():
    (values, tensors), _ = stopped_at(2, CONFIG)
    earlier = json.loads(values) | {"seconds": 1000.0}
    row = loaded(CONFIG, (json.dumps(earlier), tensors)).run_epoch()
    assert 1000 < row["seconds"] < 1010
    assert row["images_per_second"] > 1
    before, (_, step) = stopped_at(1, CONFIG)  # with all steps of the first epoch done
    row = loaded(CONFIG, before).run_epoch()
    assert step == 2
    assert row["images_per_second"] is None
    assert row["train_loss"] > 0


def test_rows_in_pinned_memory_are_saved_from_the_host(monkeypatch):
    """As a GPU's tensor with gaps they would be copied there first; here a tensor of the host stands for one."""
    trainer = make_trainer()
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    assert state.tensors(trainer)["bank"] is trainer.method.bank.pseudo_logits
    trainer.method.bank.host_rows = torch.zeros_like(trainer.method.bank.pseudo_logits)
    assert not waited
    assert state.tensors(trainer)["bank"] is trainer.method.bank.host_rows
    assert waited
