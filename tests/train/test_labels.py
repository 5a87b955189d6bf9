"""labels.csv: the class of every training sample."""

import csv
import errno
import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_data import CONFIG, CPU, all_images, dataset, make_trainer

from r2d2fast.data import PhotographImages, PhotographOptions
from r2d2fast.data.names import Names
from r2d2fast.data.photographs.images import FolderFiles
from r2d2fast.train import labels
from r2d2fast.train.errors import DivergenceError, TrainingError
from r2d2fast.train.trainer import Trainer
from tests.data.small_photographs import write_class_folders

QUIET = Console(quiet=True)


def written(trainer, directory):
    labels.write_labels(trainer, directory, QUIET)
    with (directory / "labels.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "class", "probability", "origin"]
    return rows


def logits_of(trainer):
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(all_images(trainer.data.train))


@pytest.mark.parametrize("stages", [(1,), (1, 2), (1, 2, 3)])
def test_given_labels_and_the_networks_last_predictions(stages, tmp_path):
    trainer = make_trainer(replace(CONFIG, stages=stages))
    trainer.fit()
    probabilities = logits_of(trainer).softmax(1)
    rows = written(trainer, tmp_path)
    assert len(rows) == 120
    for sample, (name, class_name, probability, origin) in enumerate(rows):
        assert name == str(sample)
        label = int(trainer.labels[sample])
        if label >= 0:
            assert (class_name, probability, origin) == (f"class {label}", "1", "given")
        else:
            best = int(probabilities[sample].argmax())
            assert (class_name, origin) == (f"class {best}", "pseudo-label")
            assert float(probability) == pytest.approx(float(probabilities[sample, best]), rel=1e-4)
    assert sum(row[3] == "given" for row in rows) == 8


NAMES = ["a,b", 'say "x"', "two\nlines", "漢字/é.jpg", " spaces ", "'", "\udce9 is no UTF-8", "", "=1+1", ";\t"]


def test_names_of_all_kinds_come_back(tmp_path):
    names = NAMES + [f"{number}" for number in range(110)]
    classes = ["cats, dogs", "ñandú", 'a "b"', "4"]
    trainer = make_trainer(data=replace(dataset(), train_names=Names.of(names), class_names=classes))
    rows = written(trainer, tmp_path)
    assert [row[0] for row in rows] == names
    assert {row[1] for row in rows} <= set(classes)
    given = {classes[label] for label in range(4)}
    assert {row[1] for row in rows if row[3] == "given"} == given


@pytest.mark.parametrize("size", [1, 7, 119, 120])
def test_the_blocks_in_which_it_is_written_do_not_matter(size, tmp_path, monkeypatch):
    trainer = make_trainer()
    whole = written(trainer, tmp_path)
    monkeypatch.setattr(labels, "ROWS", size)
    blocks = written(trainer, tmp_path)
    assert [(name, label, origin) for name, label, _, origin in blocks] == [
        (name, label, origin) for name, label, _, origin in whole
    ]
    assert [float(row[2]) for row in blocks] == pytest.approx([float(row[2]) for row in whole], rel=1e-4)


def test_images_that_cannot_be_decoded_have_no_class(tmp_path, monkeypatch):
    write_class_folders(tmp_path / "images", 8, 40, 36)
    names = Names.of(
        sorted(path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.jpg"))
    )
    for name in (names[1], names[6]):
        (tmp_path / "images" / name).write_bytes(b"no image")
    images = PhotographImages(
        FolderFiles(tmp_path / "images", names), CPU, PhotographOptions(16, 20, on_bad_image="skip")
    )
    data = replace(
        dataset(2),
        train=images,
        test=images,
        train_names=names,
        train_labels=torch.full((8,), -1),
        class_names=["a", "b"],
    )
    given = torch.tensor([0, 1, -1, -1, -1, -1, -1, -1])
    config = replace(CONFIG, stages=(1,), translate=0, stage1=replace(CONFIG.stage1, batch=2))
    trainer = Trainer(config, data, given, make_trainer().ranks)
    monkeypatch.setattr(labels, "ROWS", 4)
    rows = written(trainer, tmp_path)
    assert [row[3] for row in rows] == ["given", "given"] + ["pseudo-label"] * 4 + ["bad image", "pseudo-label"]
    assert rows[6][1:3] == ["", ""]
    assert all(row[1] in ("a", "b") and row[2] for row in rows[:6])


def test_an_old_file_stays_where_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    trainer = make_trainer()
    (tmp_path / "labels.csv").write_text("old")
    rows = labels.csv_rows
    calls = iter(range(9))

    def full(lines):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rows(lines)

    monkeypatch.setattr(labels, "ROWS", 50)
    monkeypatch.setattr(labels, "csv_rows", full)
    with pytest.raises(TrainingError, match=r"cannot write .*labels\.csv: No space left on device"):
        written(trainer, tmp_path)
    assert (tmp_path / "labels.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["labels.csv"]


def test_the_trainer_is_left_as_it_was(tmp_path):
    trainer = make_trainer()
    trainer.callback = None  # nothing may be called between batches: a checkpoint could be written
    bank = trainer.method.bank.pseudo_logits.clone()
    written(trainer, tmp_path)
    assert torch.equal(trainer.method.bank.pseudo_logits, bank)


def test_a_network_that_has_diverged_labels_nothing(tmp_path):
    trainer = make_trainer()
    (tmp_path / "labels.csv").write_text("before")
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(DivergenceError, match="logits are not finite; the network has diverged: lower"):
        labels.write_labels(trainer, tmp_path, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]
    assert (tmp_path / "labels.csv").read_text() == "before"
