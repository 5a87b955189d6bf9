"""In which numbers the network computes, and that the pseudo-labels do not notice (rule 8)."""

import math
from dataclasses import replace

import pytest
import torch

from r2d2fast.train import state
from r2d2fast.train.errors import ConfigError, DivergenceError
from r2d2fast.train.precision import Precision
from tests.train.small_data import (
    CONFIG,
    EPOCHS,
    assert_same_run,
    history_without_times,
    make_trainer,
    pseudo_logits,
    trainer_after,
)

CPU = torch.device("cpu")
HALF = ("bfloat16", "float16")


def at_stage_2(precision, scale=None, lrs=(0.1, 0.02), **changes):
    """A trainer that comes from a stage 1 in float32, to be the same for all; ``scale`` of a GradScaler."""
    begun = trainer_after(2)
    trainer = make_trainer(replace(CONFIG, precision=precision, stage2=replace(CONFIG.stage2, lrs=lrs), **changes))
    trainer.go_to(2)
    trainer.model.load_state_dict(begun.model.state_dict())
    if scale is not None:
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def momentum(trainer):
    return torch.cat([state["momentum_buffer"].flatten() for state in trainer.optimizer.state.values()])


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), *((name, getattr(torch, name)) for name in ("float32", *HALF))]
)
def test_a_name_is_a_dtype_of_autocast_and_only_float16_has_a_scale(name, dtype):
    precision = Precision(name, CPU)
    layer = torch.nn.Linear(3, 2)
    with precision.autocast():
        assert layer(torch.ones(1, 3)).dtype == precision.dtype == dtype
    assert layer(torch.ones(1, 3)).dtype == torch.float32
    assert float(precision.scale()) == (2.0**16 if dtype == torch.float16 else 1.0)


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    with pytest.raises(ConfigError, match=r"--precision bfloat16: Tesla P100 has none; accepted: float16, float32"):
        Precision("bfloat16", torch.device("cuda"))


@pytest.mark.parametrize("precision", HALF)
def test_a_whole_run_in_16_bits_learns_much_the_same_in_parameters_of_32(precision):
    half, single = make_trainer(replace(CONFIG, precision=precision)), trainer_after(EPOCHS)
    seen = set()
    half.network.register_forward_hook(lambda module, inputs, logits: seen.add((module.training, logits.dtype)))
    half.fit()
    assert (True, getattr(torch, precision)) in seen
    evaluated = half.evaluator.logits(half.data.test, torch.arange(40))
    assert {logits.dtype for _, logits in evaluated} == {torch.float32}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.method.bank.dtype == torch.float32
    for row, expected in zip(half.history, single.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.25)
    assert history_without_times(half) != history_without_times(single)
    assert_same_run(half, trainer_after(EPOCHS, replace(CONFIG, precision=precision)))


def test_the_bank_after_an_epoch_is_the_same_for_any_scale():
    """Bit for bit, of a network that is the same throughout: with a learning rate of 0. The scale may overflow, too."""
    banks = []
    for scale in (1.0, 2.0**16, 2.0**40):
        trainer = at_stage_2("float16", scale, (0.0, 0.0))
        trainer.run_epoch()
        banks.append(pseudo_logits(trainer))
        assert int(trainer.method.bank.updates) == 4
    predicted = at_stage_2("float16")
    predicted.method.predict()
    assert not torch.equal(banks[0], pseudo_logits(predicted))  # it was learned
    assert torch.equal(banks[1], banks[0])
    assert torch.equal(banks[2], banks[0])


def test_a_network_trained_with_a_scale_is_that_trained_without_and_so_is_its_loss():
    """A power of two, with which float16 loses no more than it does to small gradients; in stage 3 the loss is cross entropy."""
    with_scale, without = (at_stage_2("float16", scale) for scale in (2.0**10, 1.0))
    for position, tolerance in ((2, 1e-3), (6, 0.1)):
        for trainer in (with_scale, without):
            trainer.go_to(position)
            trainer.run_epoch()
        losses = [trainer.history[-1]["train_loss"] for trainer in (with_scale, without)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        if position == 2:
            torch.testing.assert_close(weights(with_scale), weights(without), rtol=1e-3, atol=1e-4)


def test_an_overflowing_scale_skips_steps_of_the_optimizer_but_not_of_the_bank():
    still = at_stage_2("float16", 1.0, (0.0, 0.0))
    trainer = at_stage_2("float16", 2.0**40)
    before = weights(trainer)
    row, expected = trainer.run_epoch(), still.run_epoch()
    assert torch.equal(weights(trainer), before)
    assert not momentum(trainer).any()
    assert trainer.precision.scaler.get_scale() == 2.0**36  # halved at each of four steps
    assert torch.equal(pseudo_logits(trainer), pseudo_logits(still))
    assert int(trainer.method.bank.updates) == 4
    assert math.isfinite(row["train_loss"])
    assert (row["rows"], row["class_loss"]) == (expected["rows"], expected["class_loss"])


def test_momentum_begins_with_the_first_step_that_is_not_skipped():
    """Fused SGD leaves the momentum of a skipped first step uninitialised."""
    trainer = at_stage_2("float16", 2.0**40)
    trainer.run_epoch()
    assert torch.equal(momentum(trainer), torch.zeros_like(momentum(trainer)))
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(trainer)
    trainer.train(trainer.batches()[:1])
    # A first step is lr · (1 + momentum) · gradient with Nesterov, momentum the gradient and its decay.
    torch.testing.assert_close(before - weights(trainer), 0.1 * 1.9 * momentum(trainer), rtol=1e-3, atol=1e-6)
    assert momentum(trainer).any()


@pytest.mark.parametrize(("saved", "resumed"), [("float16", "float32"), ("bfloat16", "float16")])
def test_auto_may_be_another_precision_where_a_run_goes_on(saved, resumed):
    first, second = (make_trainer(replace(CONFIG, precision=precision)) for precision in (saved, resumed))
    first.run_epoch()
    state.load_values(second, state.values(first))
    assert second.run_epoch()["epoch"] == 1


def test_predictions_that_float16_cannot_hold_are_an_error():
    trainer = at_stage_2("float16")
    with torch.no_grad():
        trainer.model[-1].bias[0] = 1e5
    with pytest.raises(DivergenceError, match="predicted logits are not finite after 2 epochs"):
        trainer.run_epoch()
