"""The metrics of an epoch, on a small synthetic data set."""

import json
from dataclasses import replace

import pytest
import torch

from r2d2fast.train import evaluation
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.trainer import Trainer
from tests.train.small_data import (
    CONFIG,
    EPOCHS,
    TIMES,
    all_images,
    dataset,
    labels_of_split,
    make_trainer,
    pseudo_logits,
    trainer_after,
)


def test_errors_are_percentages_of_wrong_test_images_and_of_wrong_pseudo_labels():
    trainer = trainer_after(5)
    trainer.model.eval()
    with torch.no_grad():
        wrong = trainer.model(all_images(trainer.data.test)).argmax(1) != trainer.data.test_labels
    assert trainer.history[-1]["test_error"] == pytest.approx(100 * wrong.double().mean().item())
    wrong = pseudo_logits(trainer).argmax(1) != trainer.data.train_labels[trainer.unlabelled]
    assert trainer.history[-1]["pseudo_label_error"] == pytest.approx(100 * wrong.double().mean().item())
    assert 0 < trainer.history[1]["test_error"] <= 100
    assert trainer.history[0]["test_error"] is None  # after 8 images, with 40 to test on
    assert [row["pseudo_label_error"] is None for row in trainer.history] == [True, True, False, False, False]
    assert not any("test_error_top5" in row for row in trainer.history)


def test_true_labels_that_nobody_knows_are_left_out_of_the_pseudo_labels_error():
    data = dataset()
    known = torch.zeros(120, dtype=torch.bool)
    trainer = make_trainer(data=data)
    known[trainer.unlabelled[:10]] = True
    some = make_trainer(data=replace(data, train_labels=data.train_labels.where(known, -1)))
    none = make_trainer(data=replace(data, train_labels=torch.full((120,), -1)))
    for _ in range(3):
        rows = [one.run_epoch() for one in (trainer, some, none)]
    wrong = pseudo_logits(trainer)[:10].argmax(1) != data.train_labels[trainer.unlabelled[:10]]
    assert rows[1]["pseudo_label_error"] == pytest.approx(100 * wrong.double().mean().item())
    assert rows[2]["pseudo_label_error"] is None
    assert rows[0]["train_loss"] == rows[1]["train_loss"] == rows[2]["train_loss"]


@pytest.mark.parametrize("classes", [199, 200])
def test_from_200_classes_on_there_is_a_top_5_error(classes):
    data = dataset(classes)
    trainer = Trainer(replace(CONFIG, stages=(1,)), data, labels_of_split(), Ranks())
    with torch.no_grad():
        trainer.model[-1].weight.copy_(torch.randn(classes, 64))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(all_images(data.test))
    # In the first three test images the true class comes first, fifth, sixth.
    labels = logits.argsort(1, descending=True)[torch.arange(40), torch.tensor([0, 4, 5] + [classes - 1] * 37)]
    trainer.data = replace(data, test_labels=labels)
    errors = trainer.evaluator.test_errors(trainer.data)
    assert errors == {"test_error": 97.5} | ({"test_error_top5": 95.0} if classes == 200 else {})


def test_errors_are_those_of_all_images_in_as_many_batches_as_it_takes_and_of_no_images_on_a_rank(monkeypatch):
    trainer = trainer_after(2)
    whole = trainer.evaluator.test_errors(trainer.data)
    for size in (7, 40, 1):
        monkeypatch.setattr(evaluation, "EVALUATION_BATCH", size)
        assert trainer.evaluator.test_errors(trainer.data) == whole
    monkeypatch.setattr(Ranks, "part", lambda self, size: slice(0, 0))
    monkeypatch.setattr(trainer.model, "forward", None)  # not every network takes an empty batch
    # Of the other ranks' sums, which are 0 here.
    assert trainer.evaluator.test_errors(trainer.data) == {"test_error": 100.0}


def test_rows_of_metrics_are_plain_values_each_with_its_epochs_times_and_statistics():
    trainer = trainer_after(EPOCHS)
    assert json.loads(json.dumps(trainer.history)) == trainer.history
    for row in trainer.history:
        assert row.keys() >= set(TIMES)
        assert 0 < row["seconds"] < 60
        assert 0 < row["outside_network"] < 1
        # 112 unlabelled samples, four whole batches of 24: each epoch of stage 2 counts its own.
        images = {1: 8, 2: 4 * 29, 3: 120}[row["stage"]]
        assert row["images_per_second"] > images / row["seconds"]
        assert row.get("rows") == (96 if row["stage"] == 2 else None)


def test_statistics_are_of_the_unlabelled_samples_of_the_epoch():
    # Pseudo-logits that are not learned, and batches that leave none of the 112 unlabelled samples out.
    config = replace(CONFIG, label_lr=0.0, stage2=replace(CONFIG.stage2, unlabelled_batch=28))
    trainer = trainer_after(3, config)
    confidence = pseudo_logits(trainer).softmax(1).max(1).values.mean().item()
    assert trainer.history[-1]["rows"] == 112
    assert trainer.history[-1]["pseudo_confidence"] == pytest.approx(confidence, rel=1e-5)
    assert {"class_loss", "entropy", "prediction_confidence", "agreement", "skipped"} <= trainer.history[-1].keys()


def test_images_that_could_not_be_decoded_are_counted():
    trainer = make_trainer()
    assert trainer.run_epoch()["bad_images"] == 0
    trainer.data.train.bad_images |= {"a.jpg": "truncated", "b.jpg": "empty"}
    assert trainer.run_epoch()["bad_images"] == 2
