import json

import pytest
from rich.console import Console

from r2d2fast.experiments.paper import TABLES, Paper, Table, Variant
from r2d2fast.experiments.results import TableResults, VariantResults
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.recipes import RECIPES


def result(seed, *errors, top5=None):
    """Of a run with stages that end with these errors."""
    stages = [{"stage": 3 - len(errors) + place + 1, "test_error": error} for place, error in enumerate(errors)]
    kinds = {"test_error": errors[-1]} | ({} if top5 is None else {"test_error_top5": top5})
    return {"seed": seed, "split": seed + 1, "seconds": 10.0, "stages": stages} | kinds


def filled(results, dataset="cifar10", paper=Paper(6.0, 0.5)):  # noqa: B008
    variants = [Variant("one", "first way", {"alpha": 0.2}, paper), Variant("two", "second way", {"alpha": 0.3})]
    definition = Table("ways to train", "cifar10", lambda config: variants)
    measured = [VariantResults(variant, of_variant) for variant, of_variant in zip(variants, results, strict=True)]
    return TableResults("table9", definition, dataset, 4000, measured)


RESULTS = [[result(0, 8.0, 6.5), result(1, 9.0, 7.5)], [result(0, 5.0), result(1, 4.0)]]


def test_ours_beside_the_papers_and_the_difference():
    one = filled(RESULTS)
    assert one.cells() == (
        ["", "after stage 2", "ours", "paper", "difference"],
        [
            ["first way", "8.50 ± 0.71", "7.00 ± 0.71", "6.00 ± 0.50", "+1.00"],
            ["second way", "–", "4.50 ± 0.71", "–", "–"],
        ],
    )
    assert one.title == (
        "Table 9: ways to train. Test error in percent after the last epoch on cifar10 with 4000 labels, seed/split 0/1, 1/2: "
        "mean ± standard deviation"
    )


def test_of_another_data_set_the_papers_are_for_orientation_and_there_is_no_difference():
    headings, rows = filled(RESULTS, "digits").cells()
    assert headings == ["", "after stage 2", "ours", "paper, on cifar10"]
    assert rows[0] == ["first way", "8.50 ± 0.71", "7.00 ± 0.71", "6.00 ± 0.50"]


def test_a_table_of_runs_without_test_data_has_no_errors():
    one = filled([[result(0, None, None)], [result(0, None)]])
    _, rows = one.cells()
    assert rows == [["first way", "–"], ["second way", "–"]]
    assert "test_error" not in one.rows[0].to_json(comparable=True)


def test_one_seed_has_no_deviation_and_seeds_that_are_their_splits_are_named_once():
    one = filled([[result(0, 8.0)], [result(0, 5.0)]])
    headings, rows = one.cells()
    assert headings == ["", "ours", "paper", "difference"]
    assert rows == [["first way", "8.00", "6.00 ± 0.50", "+2.00"], ["second way", "5.00", "–", "–"]]
    assert "±" not in one.title
    of_variant = [result(seed, 8.0) | {"split": seed} for seed in (0, 3)]
    assert filled([of_variant, of_variant]).title.endswith("seeds and splits 0, 3: mean ± standard deviation")


def test_top_5_errors_where_the_runs_have_them():
    results = [[result(0, 50.0, top5=25.0), result(1, 52.0, top5=26.0)], [result(0, 40.0, top5=20.0)] * 2]
    headings, rows = filled(results, paper=Paper(52.0, None, 27.5)).cells()
    assert headings == ["", *(f"{column} top-{k}" for k in (1, 5) for column in ("ours", "paper", "difference"))]
    assert rows[0] == ["first way", "51.00 ± 1.41", "52.00", "-1.00", "25.50 ± 0.71", "27.50", "-2.00"]
    assert rows[1][4] == "20.00 ± 0.00"


def test_the_printed_table_says_all_of_it():
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    filled(RESULTS).print(console)
    text = console.export_text()
    for part in ("Table 9: ways to train", "first way", "7.00 ± 0.71", "6.00 ± 0.50", "+1.00"):
        assert part in text


def test_markdown_and_json(tmp_path):
    filled(RESULTS).write(tmp_path)
    lines = (tmp_path / "table9.md").read_text().splitlines()
    assert lines[0].startswith("Table 9: ways to train. ")
    assert lines[2:5] == [
        "|            | after stage 2 | ours        | paper       | difference |",
        "| ---------- | ------------- | ----------- | ----------- | ---------- |",
        "| first way  | 8.50 ± 0.71   | 7.00 ± 0.71 | 6.00 ± 0.50 | +1.00      |",
    ]
    content = json.loads((tmp_path / "table9.json").read_text())
    about = [content[name] for name in ("table", "dataset", "paper_dataset", "labels")]
    assert about == ["table9", "cifar10", "cifar10", 4000]
    first = content["rows"][0]
    measured = {"mean": 7.0, "std": pytest.approx(0.5**0.5), "runs": [6.5, 7.5]}
    assert first["test_error"] == measured | {"paper": 6.0, "difference": 1.0}
    assert (first["title"], first["overrides"], first["after_stage2"]) == ("first way", {"alpha": 0.2}, [8.0, 9.0])
    assert (first["seeds"], first["splits"], first["seconds"]) == ([0, 1], [1, 2], 20.0)
    assert content["rows"][1]["test_error"]["difference"] is None
    filled(RESULTS, "digits").write(tmp_path)  # another data set, and so no difference
    assert json.loads((tmp_path / "table9.json").read_text())["rows"][0]["test_error"]["difference"] is None
    with pytest.raises(TrainingError, match=r"cannot write .*table9\.md: .*name another --run-dir"):
        filled(RESULTS).write(tmp_path / "missing")


def test_every_table_of_the_paper_can_be_filled():
    for name, definition in TABLES.items():
        base = RECIPES[definition.dataset].config
        variants = [VariantResults(variant, [result(0, 5.0)]) for variant in definition.variants(base)]
        one = TableResults(name, definition, definition.dataset, base.num_labels, variants)
        assert len(one.cells()[1]) == len(variants)
        assert one.title.startswith(f"Table {name[-1]}: ")
