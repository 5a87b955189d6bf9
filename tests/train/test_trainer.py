"""What an epoch does, on a small synthetic data set."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from r2d2fast import reference
from r2d2fast.data import BatchSampler
from r2d2fast.models.batch_norm import GroupedBatchNorm2d
from r2d2fast.train.build import make_optimizer
from r2d2fast.train.errors import ConfigError, DivergenceError
from r2d2fast.train.methods import method
from r2d2fast.train.ownership import Ownership
from r2d2fast.train.ranks import Ranks
from tests.train.small_data import (
    CONFIG,
    EPOCHS,
    EVALUATIONS,
    STEPS,
    Calling,
    all_images,
    assert_same_run,
    dataset,
    history_without_times,
    make_trainer,
    pseudo_logits,
    trainer_after,
)


class Recording:
    """Images that keep what they were asked for: (order, augmentation) of each call."""

    def __init__(self, images):
        self.images = images
        self.shape, self.bad_images = images.shape, images.bad_images
        self.calls = []

    def __len__(self):
        return len(self.images)

    def batches(self, order, augmentation, seed):
        self.calls.append((order, augmentation))
        return self.images.batches(order, augmentation, seed)


def recorded(monkeypatch, record):
    """Calls ``record`` before every optimizer step that follows; its values."""
    values = []

    def hooked(*parts):
        optimizer = make_optimizer(*parts)
        optimizer.register_step_pre_hook(lambda *_: values.append(record()))
        return optimizer

    monkeypatch.setattr("r2d2fast.train.trainer.make_optimizer", hooked)
    return values


# --- steps ----------------------------------------------------------------------------------------------------------


def test_every_step_has_its_learning_rate_from_the_schedule_is_made_in_training_mode_and_momentum_starts_with_a_stage(
    monkeypatch,
):
    trainer = make_trainer()

    def state():
        moving = any(state["momentum_buffer"].count_nonzero() for state in trainer.optimizer.state.values())
        return (
            trainer.optimizer.param_groups[0]["lr"],
            (trainer.model.training, trainer.method.d2_loss.training),
            moving,
        )

    steps = recorded(monkeypatch, state)
    trainer.fit()
    lrs, training, moving = zip(*steps, strict=True)
    assert len(lrs) == STEPS
    assert lrs[:4] == pytest.approx([0.05, 0.05 * 0.8535533905932737, 0.025, 0.05 * 0.1464466094067262])
    assert lrs[4:20] == (0.1,) * 8 + (0.02,) * 8
    assert lrs[20:] == pytest.approx(
        [0.01, 0.01 * 0.9330127018922193, 0.0075, 0.005, 0.0025, 0.01 * 0.0669872981077807]
    )
    assert [row["lr"] for row in trainer.history] == pytest.approx([0.05, 0.025, 0.1, 0.1, 0.02, 0.02, 0.01, 0.005])
    assert set(training) == {(True, True)}  # also after predictions and evaluations
    assert [n for n, has_momentum in enumerate(moving) if not has_momentum] == [0, 4, 20]


def test_the_settings_of_loss_and_optimizer_are_those_of_the_configuration():
    loss = {"alpha": 0.2, "beta": 0.05, "label_lr": 30.0, "class_loss": "mse"}
    trainer = make_trainer(replace(CONFIG, **loss, label_scale=7.0, momentum=0.8, weight_decay=0.003))
    assert {name: getattr(trainer.method.d2_loss, name) for name in loss} == loss
    labelled = trainer.method.bank.logits(trainer.ownership.local[trainer.labelled])
    assert torch.equal(labelled, 7.0 * F.one_hot(trainer.labels[trainer.labelled], 4))
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 0.003)
    assert len(group["params"]) == len(list(trainer.model.parameters()))
    make_trainer(replace(CONFIG, momentum=0.0)).run_epoch()  # without momentum Nesterov's is refused by PyTorch


def logits_and_losses(trainer):
    """Of every step that follows: (logits, loss, gradient of the classifier's bias)."""
    steps, inner = [], trainer.network.forward

    def forward(images):
        logits = inner(images)
        steps.append([logits.clone()])  # D2's gradient overwrites them
        return logits

    trainer.network.forward = forward

    def after_step():
        if trainer.model.training:  # and not while it evaluates
            steps[-1] += [trainer.losses[trainer.position.step - 1].item(), trainer.model[-1].bias.grad.clone()]

    trainer.callback = Calling(after_step)
    return steps


def test_a_loss_of_stage_1_and_its_gradient_are_the_plain_mean_also_of_an_uneven_last_batch():
    trainer = make_trainer(replace(CONFIG, stage1=replace(CONFIG.stage1, batch=3)))
    order = trainer.batches()
    steps = logits_and_losses(trainer)
    row = trainer.run_epoch()
    steps = [step for step in steps if len(step) == 3]
    assert [len(step[0]) for step in steps] == [3, 3, 2]
    for (logits, loss, gradient), (index, _, _) in zip(steps, order, strict=True):
        targets = trainer.data.train_labels[index]
        assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
        expected = (logits.softmax(1) - F.one_hot(targets, 4)).mean(0)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-5, atol=1e-7)
    assert row["train_loss"] == pytest.approx(sum(step[1] for step in steps) / 3)


def test_a_step_of_stage_2_is_the_definitions_with_the_whole_batch_as_normaliser():
    trainer = trainer_after(2)
    trainer.method.predict()
    order = trainer.batches()
    labels = trainer.labels.clone()
    before = trainer.method.bank.logits(trainer.ownership.local)
    steps = logits_and_losses(trainer)
    trainer.train(order[:1])
    ((logits, loss, gradient),) = steps
    (index, _, total), *_ = order
    assert total == len(index) == 29
    assert (labels[index] >= 0).tolist() == [False] * 24 + [True] * 5
    leaf = logits.detach().double().requires_grad_()
    expected = reference.d2_loss(
        leaf, before[index].double(), alpha=0.1, beta=0.03, class_loss="kl_reverse", normalizer=29
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, leaf.grad.sum(0).float(), rtol=1e-4, atol=1e-7)
    # ỹ −= (label_lr · alpha / D_u)(p̃ − p̂), and only of the 24.
    after, own = trainer.method.bank.logits(trainer.ownership.local), index[:24]
    step = 1000 * 0.1 / 29 * (before[own].softmax(1) - logits.detach()[:24].softmax(1))
    torch.testing.assert_close(after[own], before[own] - step, rtol=1e-5, atol=1e-5)
    others = torch.ones(120, dtype=torch.bool)
    others[own] = False
    assert torch.equal(after[others], before[others])


# --- data -----------------------------------------------------------------------------------------------------------


def test_augmentation_of_each_stage_and_no_two_images_by_the_same_random_numbers_and_none_in_evaluations():
    config = replace(CONFIG, cutout=3, translate=2, flip=True, border="reflect")
    data = dataset()
    trainer = make_trainer(config, replace(data, train=Recording(data.train), test=Recording(data.test)))
    trainer.fit()
    calls = [(order, one) for order, one in trainer.data.train.calls if one is not None]
    assert [one.cutout for _, one in calls] == [3, 3, 0, 0, 0, 0, 3, 3]
    assert {(one.translate, one.flip, one.border) for _, one in calls} == {(2, True, "reflect")}
    assert [n for n, (_, one) in enumerate(trainer.data.train.calls) if one is None] == [2, 5, 8]  # the predictions
    assert [one for _, one in trainer.data.test.calls] == [None] * EVALUATIONS
    keys = torch.cat([batch.keys for order, _ in calls for batch in order])
    assert len(keys) == 2 * 8 + 4 * 4 * 29 + 2 * 120
    assert len(keys.unique()) == len(keys)


def test_stage_1_sees_only_labelled_samples_and_their_true_labels_and_never_the_bank(monkeypatch):
    trainer = make_trainer()

    def poisoned(train):
        train[trainer.unlabelled] = 255
        return train

    blind = make_trainer(data=dataset(changed=poisoned))
    with monkeypatch.context() as patch:
        patch.setattr(Ownership, "hard_labels", lambda *_: pytest.fail("a bank larger than memory was read"))
        for _ in range(2):
            trainer.run_epoch()
            blind.run_epoch()
    assert history_without_times(trainer) == history_without_times(blind)
    # The network would have noticed: in stage 2 it does.
    assert trainer.run_epoch()["train_loss"] != blind.run_epoch()["train_loss"]


def test_stage_3_trains_on_the_hard_labels_of_all_samples(monkeypatch):
    trainer = trainer_after(6)
    orders = trainer.batches()
    batches, cross_entropy = [], F.cross_entropy

    def watched(logits, targets, **options):
        batches.append(targets)
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(method.F, "cross_entropy", watched)
    trainer.run_epoch()
    hard = trainer.labels.clone()
    hard[trainer.unlabelled] = pseudo_logits(trainer).argmax(1)
    assert [len(batch) for batch in batches] == [40, 40, 40]
    assert sorted(torch.cat([index for index, _, _ in orders]).tolist()) == list(range(120))
    assert all(torch.equal(batch, hard[index]) for batch, (index, _, _) in zip(batches, orders, strict=True))
    assert torch.equal(trainer.ownership.hard_labels(trainer.method.bank), hard)


# --- the bank -------------------------------------------------------------------------------------------------------


# The epochs before those that begin with a prediction.
@pytest.mark.parametrize("epochs", [2, 4, 6])
def test_predictions_are_made_in_eval_mode_without_augmentation(epochs, monkeypatch):
    trainer = trainer_after(epochs)
    order = trainer.sampler.partition(epochs)[0]
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(all_images(trainer.data.train)[order])
    old = trainer.method.bank.logits(trainer.ownership.local[order])
    assert not torch.allclose(old, expected, atol=1e-3)
    seen, train = [], trainer.train

    def watched(*arguments):
        seen.append(trainer.method.bank.logits(trainer.ownership.local[order]))
        train(*arguments)

    monkeypatch.setattr(trainer, "train", watched)
    trainer.run_epoch()
    assert torch.equal(seen[0], expected)


def test_the_bank_is_learned_in_stage_2_and_only_read_in_the_others():
    trainer = make_trainer()
    states = []
    for _ in trainer.schedule:
        trainer.run_epoch()
        states.append(pseudo_logits(trainer).clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(states)]
    # From stage 1's second epoch on; the last one is stage 3's second: its first predicts.
    assert changed == [False, True, True, True, True, True, False]
    kept = trainer_after(6, replace(CONFIG, stage3=replace(CONFIG.stage3, hard_labels="pseudo")))
    learned = pseudo_logits(kept).clone()
    kept.fit()
    assert torch.equal(pseudo_logits(kept), learned)  # and not predicted anew


def test_a_bank_of_16_bits_rounds_stochastically_and_learns_much_the_same():
    wide, narrow = (trainer_after(4, replace(CONFIG, bank_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert (narrow.method.bank.dtype, narrow.method.bank.rounding) == (torch.bfloat16, "stochastic")
    assert (wide.method.bank.dtype, wide.method.bank.rounding) == (torch.float32, "nearest")
    torch.testing.assert_close(pseudo_logits(narrow), pseudo_logits(wide), rtol=0.1, atol=0.1)
    assert not torch.equal(pseudo_logits(narrow), pseudo_logits(wide))
    again = trainer_after(4, replace(CONFIG, bank_dtype="bfloat16"))
    assert_same_run(narrow, again)


@pytest.mark.parametrize("before", [None, math.nan])
def test_a_bank_in_a_file_learns_the_same_whatever_the_file_held_before(tmp_path, before):
    path = tmp_path / "bank"
    if before is not None:
        torch.full((112 * 4,), before).numpy().tofile(path)
    in_file, in_memory = (trainer_after(EPOCHS, replace(CONFIG, bank_storage=str(s))) for s in (path, "device"))
    assert_same_run(in_file, in_memory)
    rows = torch.from_file(str(path), size=112 * 4).view(112, 4)
    assert torch.equal(rows, in_memory.method.bank.pseudo_logits)


def test_a_partition_that_is_not_the_first_is_taken_over_where_a_measurement_begins():
    """On two ranks another half of the samples has rows from each prediction on."""
    trainer = make_trainer()
    sampler = BatchSampler(trainer.labelled, trainer.unlabelled, 0, 0, 2)
    trainer.ownership = Ownership(trainer.labels, sampler, Ranks())
    trainer.go_to(4)
    own = sampler.partition(4)[0]
    assert torch.equal(trainer.ownership.samples, own)
    assert torch.equal(trainer.ownership.local[own], torch.arange(56))
    assert (trainer.ownership.local >= 0).sum() == 56 + 8


# --- backbones and their batch norm ---------------------------------------------------------------------------------


def test_batch_norm_in_groups_trains_another_network():
    grouped, plain = trainer_after(3, replace(CONFIG, bn_groups=2)), trainer_after(3)
    norms = [module for module in grouped.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(type(norm), norm.groups) for norm in norms} == {(GroupedBatchNorm2d, 2)}
    assert history_without_times(grouped) != history_without_times(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "smal"}, "--backbone smal: unknown backbone 'smal'; the nearest is 'small'"),
        ({"backbone": "convlarge"}, "--backbone convlarge: backbone 'convlarge' does not take images of 8×8 pixels"),
        ({"weight_norm": True}, "--backbone small: backbone 'small' has no switch weight_norm; only convlarge has it"),
        ({"input_noise": True}, "--backbone small: backbone 'small' has no switch input_noise; only convlarge has it"),
        ({"bank_storage": "pinned"}, "--bank-storage pinned: storage 'pinned' is for the kernels of a GPU"),
        ({"bank_storage": "."}, "--bank-storage '.' is a folder; accepted: device, pinned on a GPU, a file in it"),
        ({"bank_storage": "/no/such/place"}, "--bank-storage /no/such/place: cannot make the bank file"),
        ({"translate": 8}, "--translate 8: must be 0 to 7 pixels"),
        ({"num_labels": 8, "stage2": replace(CONFIG.stage2, unlabelled_batch=113)}, "there are only 112 unlabelled"),
    ],
)
def test_what_does_not_fit_the_data_or_the_machine_is_refused_by_its_flag(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(replace(CONFIG, **changes))


def test_a_bank_file_of_another_size_is_refused(tmp_path):
    path = tmp_path / "bank"
    path.write_bytes(b"somebody's file")
    with pytest.raises(ConfigError, match=f"--bank-storage {path}: .*15 bytes.*remove it or choose another path"):
        make_trainer(replace(CONFIG, bank_storage=str(path)))
    assert path.read_bytes() == b"somebody's file"


# --- divergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 50])
def test_a_loss_that_is_not_finite_names_stage_epoch_and_step(interval):
    trainer = trainer_after(3, replace(CONFIG, log_interval=interval))

    def spoil():
        if trainer.position == (3, 2):
            trainer.model[-1].bias.data[0] = math.nan

    trainer.callback = Calling(spoil)
    message = "loss is nan in stage 2, epoch 1, step 2; the network has diverged: lower"
    with pytest.raises(DivergenceError, match=message):
        trainer.run_epoch()
    assert len(trainer.history) == 3
    assert trainer.position == (3, 3 if interval == 1 else 4)


def test_a_last_step_after_which_the_network_has_diverged_ends_no_run():
    """Its loss is of the network before it."""
    stage = replace(CONFIG.stage1, epochs=1, batch=8, lr=1e30)
    trainer = make_trainer(replace(CONFIG, stages=(1,), stage1=stage))
    with pytest.raises(DivergenceError, match="logits are not finite; the network has diverged: lower"):
        trainer.fit()
    assert trainer.history == []


@pytest.mark.parametrize("here", [True, False])
def test_all_ranks_stop_where_one_predicts_what_is_not_finite_and_leave_the_bank_alone(here, monkeypatch):
    trainer = trainer_after(4)
    before = trainer.method.bank.pseudo_logits.clone()
    if here:
        with torch.no_grad():
            trainer.model[-1].bias[0] = float("inf")
    else:
        monkeypatch.setattr(Ranks, "any", lambda self, flag: True)
    with pytest.raises(DivergenceError, match="predicted logits are not finite after 4 epochs"):
        trainer.run_epoch()
    assert not here or torch.equal(trainer.method.bank.pseudo_logits, before)


def test_stage_1_by_itself_has_no_pseudo_labels(tmp_path):
    alone, whole = make_trainer(replace(CONFIG, stages=(1,), bank_storage=str(tmp_path / "bank"))), make_trainer()
    assert (alone.method.bank.nbytes, len(whole.method.bank.pseudo_logits)) == (0, 112)
    for trainer in (alone, whole):
        for _ in range(2):
            trainer.run_epoch()
    assert history_without_times(alone) == history_without_times(whole)
    assert not (tmp_path / "bank").exists()  # where stage 2 would find a file of another size


class TestWhereTheGradientLies:
    """In an epoch of stage 2, whose last step is measured: the steps whose gradient overwrites the logits, and the run."""

    def run(self, monkeypatch, network=None):
        trainer = trainer_after(2)
        d2_step, overwritten = trainer.method.d2_loss.step, []

        def step(logits, index, scale, out):
            loss, grad = d2_step(logits, index, scale, out)
            overwritten.append(grad.data_ptr() == logits.data_ptr())
            return loss, grad

        monkeypatch.setattr(trainer.method.d2_loss, "step", step)
        if network is not None:
            monkeypatch.setattr(trainer, "network", network(trainer.network))
        trainer.run_epoch()
        return overwritten, trainer

    def test_on_a_linear_layer_s_logits_in_every_step_that_is_not_measured(self, monkeypatch):
        overwritten, trainer = self.run(monkeypatch)
        assert overwritten == [True, True, True, False]
        monkeypatch.setattr("r2d2fast.train.methods.r2d2._NEED_NO_RESULT", ())
        never, other = self.run(monkeypatch)
        assert never == [False] * 4
        assert_same_run(trainer, other)

    def test_nowhere_if_backward_may_need_the_logits(self, monkeypatch):
        overwritten, _ = self.run(monkeypatch, lambda network: nn.Sequential(network, nn.Tanh()))
        assert overwritten == [False] * 4
