"""The trainer on a GPU: the same run as on a CPU, whose host never waits within an epoch."""

from dataclasses import replace

import pytest
import torch

from r2d2fast.models.backbones import BACKBONES
from r2d2fast.train import captured_steps, state
from tests.train.small_data import (
    CONFIG,
    EPOCHS,
    WITH_DROPOUT,
    Calling,
    assert_same_run,
    make_trainer,
    pseudo_logits,
    trainer_after,
)

pytestmark = pytest.mark.gpu
STAGES = {1: 0, 2: 2, 3: 6}
"""The first epoch of each."""


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_between_two_looks_at_the_loss_the_host_never_waits(device, stage, precision, compile):
    trainer = make_trainer(replace(CONFIG, precision=precision, compile=compile, log_interval=1000), device=device)
    trainer.go_to(STAGES[stage])
    epoch, batches = trainer.schedule[STAGES[stage]], trainer.batches()
    trainer.train(batches)  # loads, compiles, and records graphs
    trainer.go_to(STAGES[stage])
    steps = []

    def forbid_waiting():
        steps.append(trainer.position.step)
        torch.cuda.set_sync_debug_mode("error")

    trainer.callback = Calling(forbid_waiting)
    try:
        trainer.train(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(1, epoch.steps + 1))


def test_a_run_is_that_of_a_cpu(device):
    """In float32 and for an epoch of stage 1 and one of stage 2, after which rounding has not yet grown."""
    config = replace(CONFIG, precision="float32", stage1=replace(CONFIG.stage1, epochs=1, cosine_epochs=1))
    ours, theirs = make_trainer(config, device=device), make_trainer(config)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for trainer in (ours, theirs):
            for _ in range(2):
                trainer.run_epoch()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for name, tensor in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name].cpu(), tensor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pseudo_logits(ours).cpu(), pseudo_logits(theirs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{"precision": "float16"}, {"bank_storage": "pinned"}, {"compile": True}])
def test_all_stages_learn(device, changes):
    trainer = make_trainer(replace(CONFIG, **changes), device=device)
    trainer.fit()
    assert len(trainer.history) == EPOCHS
    assert trainer.history[-1]["test_error"] <= trainer_after(EPOCHS).history[-1]["test_error"] + 10


def test_a_checkpoint_goes_on_on_the_other_device(device):
    """Its values, and its tensors as they are."""
    for here, there in ((device, torch.device("cpu")), (torch.device("cpu"), device)):
        begun, other = make_trainer(device=here), make_trainer(device=there)
        for _ in range(3):
            begun.run_epoch()
        state.load_values(other, state.values(begun))
        for part, tensors in state.tensors(other).items():
            source = state.tensors(begun)[part]
            if isinstance(tensors, dict):
                for name, tensor in tensors.items():
                    tensor.copy_(source[name])
            else:
                tensors.copy_(source)
        other.fit()
        assert len(other.history) == EPOCHS


FIXMATCH = {
    "method": "fixmatch",
    "stages": (1, 2),
    "stage2": replace(CONFIG.stage2, repredict_epochs=(), lrs=(0.1,)),
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"optimizer": "adamw"}, {"precision": "bfloat16"}, {"bank_storage": "pinned"}, FIXMATCH],
)
def test_captured_steps_have_the_same_bits(device, monkeypatch, changes):
    monkeypatch.setattr(captured_steps, "WARM_UP", 1)
    monkeypatch.setitem(BACKBONES, "small", WITH_DROPOUT)
    captured, other = (make_trainer(replace(CONFIG, cuda_graphs=on, **changes), device=device) for on in (True, False))
    for trainer in (captured, other):
        trainer.fit()
    assert_same_run(captured, other)
