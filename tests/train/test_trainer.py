"""What an epoch does, on a small synthetic data set."""

import itertools
from dataclasses import replace

import pytest
import torch

from r2d2fast.data import ImageDataset
from r2d2fast.train.errors import ConfigError, DivergenceError
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.trainer import Trainer

DIGITS = RECIPES["digits"]
CONFIG = replace(
    DIGITS,
    split=0,
    device="cpu",
    num_labels=8,
    stage1=replace(DIGITS.stage1, epochs=2, batch=4, lr=0.05, cosine_epochs=2),
    stage2=replace(
        DIGITS.stage2, epochs=4, unlabelled_batch=24, labelled_batch=5, repredict_epochs=(2,), lrs=(0.1, 0.02)
    ),
    stage3=replace(DIGITS.stage3, epochs=2, batch=40, lr=0.01),
)


def dataset():
    """120 images of four classes, each class with its own bright corner, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    images = torch.randn(160, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[i, :, top : top + 4, left : left + 4] += 1.0
    return ImageDataset(images[:120], labels[:120], images[120:], labels[120:], num_classes=4, background=0.0)


def trainer_after(epochs, config=CONFIG):
    trainer = Trainer(config, dataset())
    for _ in range(epochs):
        trainer.run_epoch()
    return trainer


def recorded(trainer, record):
    """Calls ``record`` before every optimizer step that follows; its values."""
    values = []
    make = trainer._make_optimizer

    def hooked():
        optimizer = make()
        optimizer.register_step_pre_hook(lambda *_: values.append(record()))
        return optimizer

    trainer._make_optimizer = hooked
    return values


def run_all(trainer):
    while len(trainer.rows) < len(trainer.schedule):
        trainer.run_epoch()


def test_every_step_takes_its_learning_rate_from_the_schedule():
    trainer = Trainer(CONFIG, dataset())
    lrs = recorded(trainer, lambda: trainer.optimizer.param_groups[0]["lr"])
    run_all(trainer)
    assert lrs[:4] == pytest.approx([0.05, 0.05 * 0.8535533905932737, 0.025, 0.05 * 0.1464466094067262])
    assert lrs[4:20] == [0.1] * 8 + [0.02] * 8
    assert lrs[20:] == pytest.approx(
        [0.01, 0.01 * 0.9330127018922193, 0.0075, 0.005, 0.0025, 0.01 * 0.0669872981077807]
    )
    assert [row["lr"] for row in trainer.rows] == pytest.approx([0.05, 0.025, 0.1, 0.1, 0.02, 0.02, 0.01, 0.005])


def test_momentum_is_kept_through_stage_2_and_starts_anew_with_each_stage():
    trainer = Trainer(CONFIG, dataset())
    steps_with_momentum = recorded(trainer, lambda: len(trainer.optimizer.state) > 0)
    run_all(trainer)
    starts = [n for n, has_momentum in enumerate(steps_with_momentum) if not has_momentum]
    assert starts == [0, 4, 20]


def test_every_step_is_made_in_training_mode_also_after_predictions_and_evaluations():
    trainer = Trainer(CONFIG, dataset())
    training = recorded(trainer, lambda: (trainer.model.training, trainer.d2_loss.training))
    run_all(trainer)
    assert training == [(True, True)] * 26


def own_predictions(trainer):
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(trainer.data.train_images[trainer.unlabelled])


def assert_predicted_before_training(trainer, monkeypatch):
    """The next epoch begins by giving the bank the network's eval mode logits of the images as they are."""
    expected = own_predictions(trainer)
    seen = []
    stage = trainer._stage

    def watched(epoch):
        seen.append(trainer.bank.logits(trainer.unlabelled).clone())
        return stage(epoch)

    monkeypatch.setattr(trainer, "_stage", watched)
    trainer.run_epoch()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


# Epochs 0 and 1 are stage 1; 2 to 5 stage 2 with a reprediction before 4; 6 and 7 stage 3.
@pytest.mark.parametrize("epochs", [2, 4, 6])
def test_predictions_are_made_in_eval_mode_without_augmentation(epochs, monkeypatch):
    trainer = trainer_after(epochs)
    old = trainer.bank.logits(trainer.unlabelled).clone()
    assert not torch.allclose(old, own_predictions(trainer), atol=1e-3)
    assert_predicted_before_training(trainer, monkeypatch)


def test_the_bank_is_learned_in_stage_2_and_only_read_in_the_others():
    trainer = Trainer(CONFIG, dataset())
    states = []
    for _ in trainer.schedule:
        trainer.run_epoch()
        states.append(trainer.bank.logits(trainer.unlabelled).clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(states)]
    # From stage 1's second epoch on; the last one is stage 3's second: its first predicts.
    assert changed == [False, True, True, True, True, True, False]


def test_pseudo_labels_as_hard_labels_are_not_predicted_anew():
    trainer = trainer_after(6, replace(CONFIG, stage3=replace(CONFIG.stage3, hard_labels="pseudo")))
    learned = trainer.bank.logits(trainer.unlabelled).clone()
    run_all(trainer)
    assert torch.equal(trainer.bank.logits(trainer.unlabelled), learned)


def test_stage_3_trains_on_the_hard_labels_of_all_samples(monkeypatch):
    trainer = trainer_after(6)
    batches = []
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "r2d2fast.train.trainer.F.cross_entropy",
        lambda logits, targets: batches.append(targets) or cross_entropy(logits, targets),
    )
    trainer.run_epoch()
    hard = trainer.data.train_labels.clone()
    hard[trainer.unlabelled] = trainer.bank.logits(trainer.unlabelled).argmax(1)
    assert [len(batch) for batch in batches] == [40, 40, 40]
    assert torch.bincount(torch.cat(batches), minlength=4).tolist() == torch.bincount(hard, minlength=4).tolist()


def test_stage_1_sees_only_labelled_samples_and_their_true_labels(monkeypatch):
    trainer = Trainer(CONFIG, dataset())
    poisoned = dataset()
    poisoned.train_images[trainer.unlabelled] = float("nan")
    blind = Trainer(CONFIG, poisoned)
    assert trainer.run_epoch()["train_loss"] == blind.run_epoch()["train_loss"]


def test_errors_are_percentages_of_wrong_test_images_and_of_wrong_pseudo_labels():
    trainer = trainer_after(5)
    trainer.model.eval()
    with torch.no_grad():
        wrong = trainer.model(trainer.data.test_images).argmax(1) != trainer.data.test_labels
    assert trainer.rows[-1]["test_error"] == pytest.approx(100 * wrong.float().mean().item())
    pseudo = trainer.bank.logits(trainer.unlabelled).argmax(1)
    wrong = pseudo != trainer.data.train_labels[trainer.unlabelled]
    assert trainer.rows[-1]["pseudo_label_error"] == pytest.approx(100 * wrong.float().mean().item())
    assert 0 < trainer.rows[0]["test_error"] <= 100
    assert [row["pseudo_label_error"] is None for row in trainer.rows] == [True, True, False, False, False]


def test_statistics_are_those_of_their_own_epoch():
    trainer = trainer_after(6)
    rows = [row for row in trainer.rows if row["stage"] == 2]
    # 112 unlabelled samples, four whole batches of 24: each epoch counts its own.
    assert [row["rows"] for row in rows] == [96] * 4
    assert "rows" not in trainer.rows[0]


def test_statistics_are_of_the_unlabelled_samples_of_the_epoch():
    # Pseudo-logits that are not learned, and batches that leave none of the 112 unlabelled samples out.
    config = replace(CONFIG, label_lr=0.0, stage2=replace(CONFIG.stage2, unlabelled_batch=28))
    trainer = trainer_after(3, config)
    confidence = trainer.bank.probs(trainer.unlabelled).max(1).values.mean().item()
    assert trainer.rows[-1]["rows"] == 112
    assert trainer.rows[-1]["pseudo_confidence"] == pytest.approx(confidence, rel=1e-5)
    assert {"class_loss", "entropy", "prediction_confidence", "agreement", "skipped"} <= trainer.rows[-1].keys()


def test_training_depends_on_no_random_state_but_its_own():
    first = trainer_after(8)
    torch.manual_seed(777)
    second = Trainer(CONFIG, dataset())
    torch.manual_seed(888)
    run_all(second)
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("epochs", range(8))
def test_a_trainer_with_a_loaded_state_goes_on_as_the_one_that_saved_it(epochs):
    first = trainer_after(epochs)
    # Labelled samples of a half-used order are part of the state: 20 an epoch of orders of 8.
    assert (len(first.stream.queue) > 0) == (epochs in (3, 5))
    # A deep copy, as a file would be.
    state = torch.utils._pytree.tree_map(_clone, first.state_dict())
    second = Trainer(CONFIG, dataset())
    second.load_state_dict(state)
    run_all(first)
    run_all(second)
    weights = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    everything = first.everything
    assert torch.equal(first.bank.logits(everything), second.bank.logits(everything))


def _clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_a_loss_that_is_not_finite_names_stage_epoch_and_step():
    trainer = trainer_after(3)
    with torch.no_grad():
        trainer.model[-1].bias[0] = float("nan")
    with pytest.raises(
        DivergenceError, match="loss is nan in stage 2, epoch 1, step 0; the network has diverged: lower"
    ):
        trainer.run_epoch()
    assert len(trainer.rows) == 3


def test_predicted_logits_that_are_not_finite_leave_the_bank_alone():
    trainer = trainer_after(4)
    before = trainer.bank.logits(trainer.unlabelled).clone()
    with torch.no_grad():
        trainer.model[-1].bias[0] = float("inf")
    with pytest.raises(DivergenceError, match="predicted logits are not finite after 4 epochs"):
        trainer.run_epoch()
    assert torch.equal(trainer.bank.logits(trainer.unlabelled), before)


def test_labels_that_do_not_fit_the_data_are_refused_by_the_flag():
    with pytest.raises(ConfigError, match="--num-labels: num_labels is 10; it must be a positive multiple of the 4"):
        Trainer(replace(CONFIG, num_labels=10), dataset())
