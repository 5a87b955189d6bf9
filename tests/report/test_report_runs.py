import json
import re

import pytest
from made_runs import make_run, rows

from r2d2fast.report.errors import ReportError
from r2d2fast.report.runs import find_runs, read_run


def test_a_finished_run(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.state == "finished"
    assert run.rows == rows()
    assert run.results["test_error"] == 10.0
    assert (run.labelled, run.classes) == (2, {"zero", "one"})
    assert [row["epoch"] for row in run.rows_of(2)] == [0, 1, 2]


@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_unfinished_run_tells_how_far_it_is(tmp_path, done):
    run = read_run(make_run(tmp_path / "run", done=done))
    assert run.results is None
    assert len(run.rows) == done
    assert run.state == f"{done} of 6 epochs"


def test_a_run_that_has_only_begun(tmp_path):
    directory = make_run(tmp_path / "run", {"num_labels": 30}, done=0)
    (directory / "metrics.jsonl").unlink()
    (directory / "labelled.txt").unlink()
    run = read_run(directory)
    assert (run.rows, run.labelled) == ([], 30)


def test_the_half_line_of_a_killed_process_is_no_damage(tmp_path):
    directory = make_run(tmp_path / "run", done=3)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 2, "epo')
    assert len(read_run(directory).rows) == 3


def test_a_finished_run_whose_metrics_are_cut_is_damaged(tmp_path):
    directory = make_run(tmp_path / "run")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text[:-5])
    with pytest.raises(ReportError, match=re.escape("has 5 epochs, which are not those of results.json")):
        read_run(directory)


def changed(**values):
    return lambda text: json.dumps({**json.loads(text), **values})


def in_a_stage(**values):
    def change(text):
        held = json.loads(text)
        held["stages"][1] |= values
        return json.dumps(held)

    return change


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.json", lambda text: text[:30], "config.json is damaged: no JSON"),
        ("config.json", lambda text: "[]", "config.json is damaged: no JSON object"),
        ("config.json", lambda text: None, "config.json cannot be read"),
        ("config.json", changed(seed=None), "seed is None"),
        ("config.json", changed(dataset=3), "dataset is 3"),
        ("config.json", changed(stages=[1, 4]), "stages is [1, 4]"),
        ("config.json", changed(stages=[]), "stages is []"),
        ("config.json", changed(**{"stage2.epochs": "3"}), "stage2.epochs is '3'"),
        ("metrics.jsonl", lambda text: None, "metrics.jsonl cannot be read"),
        ("metrics.jsonl", lambda text: text.replace("{", "", 1), "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", lambda text: text.replace("25.0", "NaN"), "metrics.jsonl, line 4: test_error is nan"),
        (
            "metrics.jsonl",
            lambda text: text.replace('"test_error"', '"error"'),
            "metrics.jsonl, line 1: test_error is None",
        ),
        ("metrics.jsonl", lambda text: text.replace("0.91", "Infinity"), "line 4: prediction_confidence is inf"),
        ("metrics.jsonl", lambda text: text.replace("0.91", '"x"'), "line 4: prediction_confidence is 'x'"),
        ("metrics.jsonl", lambda text: text.replace('"epoch"', '"epos"', 1), "line 1: epoch is None"),
        ("results.json", lambda text: text[:-9], "results.json is damaged"),
        ("results.json", changed(stages=3), "results.json has no list of stages"),
        ("results.json", changed(seconds=None), "seconds is None"),
        ("results.json", in_a_stage(epochs=3.0), "entry 2 of stages: epochs is 3.0"),
        ("results.json", in_a_stage(test_error="20"), "entry 2 of stages: test_error is '20'"),
        ("results.json", in_a_stage(d2_test_error=float("nan")), "entry 2 of stages: d2_test_error is nan"),
        ("results.json", in_a_stage(epochs=2), "has 6 epochs, which are not those of results.json"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, damage, said):
    path = make_run(tmp_path / "run") / name
    text = damage(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ReportError, match=re.escape(said)) as info:
        read_run(path.parent)
    assert str(path.parent) in str(info.value)


def test_runs_are_found_below_the_directories_named_each_once(tmp_path):
    for name in ("b/run1", "b/run0", "a"):
        make_run(tmp_path / name)
    (tmp_path / "b" / "results.json").write_text("{}")  # of a table over the runs, say
    (tmp_path / "b" / "run0" / "config.json").unlink()  # damaged, but a run
    found = find_runs([tmp_path / "b", tmp_path / "a", tmp_path / "b" / "run1", tmp_path / "b" / ".." / "a"])
    assert found == [tmp_path / "b" / "run0", tmp_path / "b" / "run1", tmp_path / "a"]


@pytest.mark.parametrize("name", ["nothing", "file", "empty"])
def test_what_holds_no_run_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=f"{name} (is no directory|holds no run)"):
        find_runs([make_run(tmp_path / "run"), tmp_path / name])
