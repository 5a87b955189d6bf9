"""The trainer and the plain loop take the steps that are timed, and a bank in a file can be measured."""

import math
import re

import pytest
import torch

from bench import accuracy, mapped_bank
from bench import training as command


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def test_the_network_and_the_rest_share_the_time_of_a_step():
    assert 0 < command.share_outside(command.digits(), count=2, rounds=1) < 1


@pytest.mark.parametrize("eager", [False, True])
def test_the_loss_of_a_linear_head_moves_the_bank_in_its_share_of_the_time(eager):
    trainer = command.linear_head()
    before = trainer.method.bank.pseudo_logits.clone()
    if eager:
        trainer.method.d2_loss.step = None
    assert 0 < command.share_of_loss(trainer, count=1, rounds=1, eager=eager) < 1
    changed = (trainer.method.bank.pseudo_logits != before).any(1)
    assert int(changed.sum()) == trainer.config.stage2.unlabelled_batch


def test_images_of_a_second_are_those_of_its_steps(monkeypatch):
    trainer, ticks = command.digits(), iter(range(0, 100, 2))
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(command, "steps_of", lambda *_: lambda: None)
    assert command.images_per_second(trainer, count=3, rounds=2) == 3 * (96 + 32) / 2


def test_the_plain_loop_learns_pseudo_labels_of_unlabelled_samples_alone():
    trainer, loop = command.thumbnails(size=8, channels=1, translate=1)
    before = loop.bank.detach().clone()
    assert loop.run(1) > 0
    changed = (loop.bank != before).any(1)
    assert int(changed.sum()) == trainer.config.stage2.unlabelled_batch
    assert not changed[loop.labels >= 0].any()
    assert all(math.isfinite(loss) and 0 <= accuracy <= 1 for loss, accuracy in loop.seen)
    assert command.times_as_fast(command.steps_of(trainer, 1), lambda: loop.run(1), rounds=1) > 0


@pytest.mark.slow
def test_resnet_on_photographs_shares_its_time_too(tmp_path):
    assert 0 < command.share_outside(command.photographs(tmp_path), count=1, rounds=1) < 1


@pytest.mark.slow
def test_the_command_prints_both_tables(capsys, monkeypatch):
    thumbnails = command.thumbnails
    monkeypatch.setattr(command, "thumbnails", lambda size, *others: thumbnails(8, *others))
    monkeypatch.setattr(
        command, "photographs", lambda *_: command.digits()
    )  # without a ResNet-18, which takes a minute
    command.main(rounds=1)
    printed = capsys.readouterr().out
    assert re.search(r"\| resnet18 +\| \d+\.\d % +\| ≤ 5 %", printed)
    assert re.search(r"\| eager PyTorch +\| \d+\.\d % +\|", printed)
    assert re.search(r"\| ours, stage 2 at 224 pixels, cpu +\| \d+ +\|", printed)
    assert re.search(r"\| CIFAR +\| \d+\.\d\d +\| \d+ % +\| \d+ %", printed)


def test_a_bank_in_a_file_is_predicted_trained_and_saved(tmp_path, monkeypatch, capsys):
    for name, value in {"SAMPLES": 2000, "CLASSES": 10, "STEPS": 2, "limited": lambda: "none"}.items():
        monkeypatch.setattr(mapped_bank, name, value)
    mapped_bank.measure(tmp_path)
    first, *actions = capsys.readouterr().out.splitlines()
    assert first == "bank: 0.00 GB; limit: none"
    assert [line.split(":")[0] for line in actions] == [
        "prediction of all rows",
        "2 steps",
        "hard labels",
        "checkpoint",
    ]
    assert (tmp_path / "bank.bin").stat().st_size == 1990 * 10 * 4


def test_our_gradient_is_at_least_as_accurate_as_eager_pytorch(capsys):
    accuracy.main(classes=(1000,))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["kl_reverse", "kl", "mse"]
    assert all(float(cell) <= 1 for row in rows for cell in row[1:])
