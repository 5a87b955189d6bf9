"""Averaged weights, and distribution alignment and early stopping of stage 2."""

import copy
from dataclasses import replace

import pytest
import torch

from r2d2fast import PseudoLabelBank
from r2d2fast.train.averaging import WeightAverage
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods.alignment import Alignment
from r2d2fast.train.methods.early_stopping import EarlyStopping
from r2d2fast.train.ranks import Ranks
from tests.train.small_data import CONFIG, assert_same_run, loaded, make_trainer, saved, trainer_after


def with_stage2(**settings):
    return replace(CONFIG, stage2=replace(CONFIG.stage2, **settings))


ALL = replace(
    with_stage2(distribution_alignment=True, labelled_error_limit=100.0, weight_decay=1e-4), ema=0.9, optimizer="adamw"
)


def test_the_average_follows_the_weights():
    network = torch.nn.Linear(3, 2)
    average = WeightAverage(network)
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    average.update(0.25)
    torch.testing.assert_close(average.model.weight, before + 0.25)


def same(one, other):
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("last", [1, 5, 7], ids=["stage 1", "stage 2", "stage 3"])
def test_a_stage_ends_with_the_average_of_its_weights_and_the_next_one_has_another(last):
    trainer = trainer_after(last, replace(CONFIG, ema=0.9))
    assert trainer.evaluator.model is trainer.averaged.model
    assert not same(trainer.averaged.model.state_dict(), trainer.model.state_dict())
    average = trainer.averaged.model
    trainer.run_epoch()
    assert same(average.state_dict(), trainer.model.state_dict())
    if last < 7:
        assert trainer.averaged.model is not average
        assert same(average.state_dict(), trainer.averaged.model.state_dict())
    else:
        assert trainer.evaluator.model is trainer.model


def test_adamw_takes_the_schedule_s_learning_rate_and_weight_decay_and_pytorch_s_betas():
    trainer = make_trainer(replace(CONFIG, optimizer="adamw", weight_decay=0.03))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == (torch.optim.AdamW([torch.zeros(1)]).defaults["betas"], 0.03)
    trainer.train(trainer.batches()[:1])
    # The first step of Adam is the learning rate, whatever the gradient; the weight decay comes to it.
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        step = (new.detach() - old * (1 - CONFIG.stage1.lr * 0.03)).abs().max().item()
        assert step == pytest.approx(CONFIG.stage1.lr, rel=0.01)


def test_adamw_has_no_momentum_to_set():
    with pytest.raises(ConfigError, match=r"--momentum 0.5: must be 0.9 with --optimizer adamw, which has none"):
        make_trainer(replace(CONFIG, optimizer="adamw", momentum=0.5))


def test_aligned_predictions_keep_the_shares_of_the_first():
    torch.manual_seed(0)
    bank = PseudoLabelBank(torch.full((5000,), -1), 4)
    alignment = Alignment(bank, Ranks())
    first = torch.randn(5000, 4) + torch.tensor([1.0, 0, 0, -1])
    bank.pseudo_logits.copy_(first)
    alignment.align_()
    assert torch.equal(bank.pseudo_logits, first)
    shares = first.softmax(1).mean(0)
    bank.pseudo_logits.copy_(2 * first + torch.tensor([2.0, 0, 1, -1]))
    drifted = bank.pseudo_logits.softmax(1).mean(0)
    alignment.align_()
    assert (drifted - shares).abs().max() > 0.2
    torch.testing.assert_close(bank.pseudo_logits.softmax(1).mean(0), shares, atol=0.04, rtol=0)


def test_early_stopping_gives_back_the_last_good_weights():
    network = torch.nn.Linear(3, 2)
    stopping = EarlyStopping(network, 6.0, labelled=1000)
    stopping.first_error = 2.0
    with torch.no_grad():
        network.weight.fill_(1.0)
    assert not stopping.stop(8.0, network)
    with torch.no_grad():
        network.weight.fill_(2.0)
    assert stopping.stop(8.1, network)
    assert (network.weight == 1).all()


@pytest.mark.parametrize(
    ("expected_error", "labelled", "rise", "stops"),
    [
        (5.0, 200, 1.5, False),
        (5.0, 200, 2.0, True),
        (5.0, 50, 4.0, False),
        (5.0, 50, 6.0, True),
        (40.0, 200, 6.5, True),
    ],
)
def test_what_harms_depends_on_what_stage_1_expects_and_on_the_number_of_samples(expected_error, labelled, rise, stops):
    stopping = EarlyStopping(torch.nn.Linear(3, 2), 6.0, labelled)
    stopping.expected_error = expected_error
    assert stopping.stop(rise, torch.nn.Linear(3, 2)) is stops


def test_a_stage_2_that_harms_is_ended_with_the_network_before(monkeypatch):
    trainer = trainer_after(2, replace(with_stage2(labelled_error_limit=6.0), ema=0.9))
    first = copy.deepcopy(trainer.model.state_dict())
    errors = iter([0.0, 50.0])
    monkeypatch.setattr(trainer.method, "_labelled_error", lambda: next(errors))
    trainer.run_epoch()
    row = trainer.run_epoch()  # before the reprediction of epoch 2
    assert (row["stage"], row["epoch"], row["stopped"]) == (2, 1, True)
    assert all(torch.equal(first[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert trainer.schedule[trainer.position.epoch].stage == 3
    trainer.fit()
    assert [row["stage"] for row in trainer.history] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("steps", [2, 5])
def test_a_resumed_run_is_the_same(steps):
    whole = trainer_after(8, ALL)
    resumed = loaded(ALL, saved(trainer_after(steps, ALL)))
    resumed.fit()
    assert_same_run(whole, resumed)
