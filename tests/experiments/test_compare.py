"""``compare``: methods that see as many images, in one table."""

import json

import pytest

from r2d2fast.experiments import cli
from r2d2fast.experiments.compare import configuration
from r2d2fast.train.methods import METHODS
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.schedule import images_seen, make_schedule
from tests.train.same_run import metrics

COMMAND = ["compare", "--dataset", "digits", "--threads", "1", "--schedule-scale", "0.01", "--run-dir"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_as_many_images_as_r2d2(method):
    base = RECIPES["digits"].config
    config = configuration(base, method, 50, 1387, 1)
    seen, wanted = (images_seen(one, make_schedule(one, 50, 1387), 50, 1387) for one in (config, base))
    assert seen == pytest.approx(wanted, rel=0.01)
    assert (config.method, config.backbone, config.translate) == (method, base.backbone, base.translate)


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


@pytest.mark.slow
def test_table_7_has_the_opponents_that_were_run(tmp_path):
    assert cli.main([*COMMAND, str(tmp_path), "--seeds", "3", "--methods", "fixmatch"]) == 0
    assert cli.main(["table7", *COMMAND[1:], str(tmp_path), "--seeds", "3"]) == 0
    rows = json.loads((tmp_path / "digits/table7.json").read_text())["rows"]
    assert [row["title"] for row in rows] == ["labels alone", "all labels", "R2-D2", "fixmatch, by compare"]


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
