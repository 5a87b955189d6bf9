"""``compare``: methods that see as many images, in one table."""

import json

import numpy as np
import pytest

from r2d2fast.experiments import cli
from r2d2fast.experiments.compare import configuration
from r2d2fast.train import cli as trainer
from r2d2fast.train.methods import METHODS
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.schedule import images_seen, make_schedule
from tests.blobs import blobs, few
from tests.train.same_run import metrics

COMMAND = ["compare", "--dataset", "digits", "--threads", "1", "--schedule-scale", "0.01", "--run-dir"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_as_many_images_as_r2d2(method):
    base = RECIPES["digits"].config
    config = configuration(base, method, 50, 1387, 1)
    seen, wanted = (images_seen(one, make_schedule(one, 50, 1387), 50, 1387) for one in (config, base))
    assert seen == pytest.approx(wanted, rel=0.01)
    assert (config.method, config.backbone, config.translate) == (method, base.backbone, base.translate)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given",
    [
        ["--optimizer", "adamw"],
        ["--weight-decay", "0.007", "--ema", "0.5", "--stage2.unlabelled-batch", "48"],
        ["--backbone", "conv", "--translate", "2", "--flip", "--num-labels", "100"],
    ],
)
def test_the_trainer_s_flags_hold_for_every_method(method, given):
    compared = configuration(trainer.parse(given), method, 50, 1387, 1)
    alone = trainer.parse([*given, "--method", method])
    for flag in ("weight_decay", "optimizer", "ema", "backbone", "translate", "flip", "num_labels", "stages"):
        assert getattr(compared, flag) == getattr(alone, flag)
    for flag in ("lrs", "unlabelled_batch", "labelled_batch", "weight_decay"):
        assert getattr(compared.stage2, flag) == getattr(alone.stage2, flag)


def test_flags_of_r2d2_alone_are_no_other_method_s():
    given = ["--alpha", "0.3", "--stage2.lrs", "0.1,0.05", "--stage2.repredict-epochs", "30", "--label-lr", "7"]
    compared = configuration(trainer.parse(given), "fixmatch", 50, 1387, 1)
    alone = trainer.parse(["--method", "fixmatch"])
    assert compared.stage2.lrs == alone.stage2.lrs
    assert compared.stage2.repredict_epochs == ()
    assert (compared.alpha, compared.label_lr) == (alone.alpha, alone.label_lr)


def test_a_comparison_is_a_table_that_is_resumed_without_training_again(tmp_path, monkeypatch, capsys):
    command = [*COMMAND, str(tmp_path), "--seeds", "3", "--methods", "supervised,mean-teacher"]
    assert cli.main(command) == 0
    before = metrics(tmp_path / "digits/seed3-split3/compare-mean-teacher")
    content = json.loads((tmp_path / "digits/compare.json").read_text())
    runs = {method: rows[0] for method, rows in content["rows"].items()}
    assert list(runs) == ["supervised", "mean-teacher"]
    assert runs["mean-teacher"]["test_error"] == before[-1]["test_error"]
    table = (tmp_path / "digits/compare.md").read_text()
    assert f"| {before[-1]['test_error']:.2f} " in table
    assert f"| {runs['supervised']['images_seen']} " in table
    monkeypatch.setattr("r2d2fast.experiments.cli.run", lambda *_: pytest.fail("trained again"))
    assert cli.main([*command, "--resume"]) == 0
    assert "mean-teacher" in capsys.readouterr().out
    assert (tmp_path / "digits/compare.md").read_text() == table


def test_a_dry_run_takes_the_labels_that_a_data_set_has(tmp_path, capsys):
    x, y = blobs()
    np.save(tmp_path / "train.npy", x)
    np.save(tmp_path / "train_labels.npy", few(y))
    methods = "r2d2,supervised,temporal-ensembling,pseudo-label"
    command = ["compare", "--dataset", "embeddings", "--data-dir", str(tmp_path), "--methods", methods]
    assert cli.main([*command, "--seeds", "0", "--dry-run", "--run-dir", str(tmp_path / "runs")]) == 0
    assert "4 runs with embeddings" in capsys.readouterr().out


@pytest.mark.slow
def test_table_7_has_the_opponents_that_were_run(tmp_path):
    assert cli.main([*COMMAND, str(tmp_path), "--seeds", "3", "--methods", "fixmatch"]) == 0
    assert cli.main(["table7", *COMMAND[1:], str(tmp_path), "--seeds", "3"]) == 0
    rows = json.loads((tmp_path / "digits/table7.json").read_text())["rows"]
    assert [row["title"] for row in rows] == ["labels alone", "all labels", "R2-D2", "fixmatch, by compare"]


@pytest.mark.slow
def test_table_7_leaves_out_opponents_of_other_settings(tmp_path, capsys):
    other = [*COMMAND, str(tmp_path), "--seeds", "3", "--num-labels", "100"]
    assert cli.main([*other, "--methods", "fixmatch"]) == 0
    assert cli.main(["table7", *COMMAND[1:], str(tmp_path), "--seeds", "3"]) == 0
    assert "fixmatch, by compare, is left out: " in (printed := capsys.readouterr().out)
    assert "num_labels is 100 there, 50 asked for" in printed
    content = json.loads((tmp_path / "digits/table7.json").read_text())
    assert [row["title"] for row in content["rows"]] == ["labels alone", "all labels", "R2-D2"]
    assert content["labels"] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "compare: no data set is its own; name one by --dataset"),
        (["compare", "--dataset", "digits", "--methods", "vat,x"], "--methods vat,x: 'x' is none; accepted: r2d2"),
        (["table7", "--method", "vat"], "--method: a flag of single runs; here: --methods, of compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, tmp_path, capsys):
    assert cli.main([*arguments, "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
