import numpy as np
import pytest
from made_runs import make_run, record_data, rows

from r2d2fast.report.groups import make_groups, value_text
from r2d2fast.report.runs import read_run
from r2d2fast.report.tables import results_table, runs_table


@pytest.fixture
def run(tmp_path):
    """Makes a run of a changed configuration: run(made=…, done=…, **settings)."""
    made = []

    def make(settings=None, **keywords):
        made.append(read_run(make_run(tmp_path / str(len(made)), settings, **keywords)))
        return made[-1]

    return make


def test_runs_that_differ_in_seed_and_split_are_one_group(run):
    runs = [
        run(),
        run({"alpha": 0.2}),
        run({"seed": 1}),
        run({"split": 5}),
        run({"split_file": "splits/3.txt"}),
        run({"alpha": 0.2, "seed": 2, "split": 2}),
    ]
    one, other = make_groups(runs)
    assert one.runs == [runs[0], *runs[2:5]]
    assert other.runs == [runs[1], runs[5]]
    assert (one.title, other.title) == ("A: alpha 0.1", "B: alpha 0.2")


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"stage1.lr": 1.0}, {"stage2.repredict_epochs": [2]}, {"dataset": "mnist"}]
)
def test_any_other_setting_sets_runs_apart(run, settings):
    ((name, value),) = settings.items()
    assert [group.title for group in make_groups([run(), run(settings)])][1] == f"B: {name} {value_text(value)}"


@pytest.mark.parametrize(
    "settings",
    [{"data_dir": "/elsewhere"}, {"device": "cuda:1"}, {"threads": 4}, {"workers": 2}, {"bank_storage": "/tmp/bank"}],
)
def test_where_and_how_a_run_was_made_is_no_other_configuration(run, settings):
    (group,) = make_groups([run(), run(settings | {"seed": 1})])
    assert len(group.counted) == 2
    assert not settings.keys() & group.settings.keys()


@pytest.mark.parametrize("dataset", ["folder", "embeddings", "python"])
def test_data_whose_name_does_not_say_what_they_are_are_told_apart_by_their_directory(run, dataset):
    runs = [run({"dataset": dataset, "data_dir": f"/{name}", "seed": seed}) for seed, name in enumerate("aba")]
    one, other = make_groups(runs)
    assert (one.runs, other.runs) == ([runs[0], runs[2]], [runs[1]])
    assert (one.title, other.title) == ("A: data_dir /a", "B: data_dir /b")


@pytest.mark.parametrize(
    "other",
    [
        {"names": ["a.png", "c.png"]},
        {"names": ["a.png", "b.png", "c.png"]},
        {"classes": ["cat", "cow"]},
        {"shape": (3, 8, 9)},
        {"std": (9.0, 8.0, 7.1)},
        {"tests": 361},
    ],
)
def test_what_finished_runs_have_recorded_tells_data_apart_whatever_their_directory(run, other):
    runs = [run({"dataset": "folder", "seed": seed, "data_dir": f"/{place}"}) for seed, place in enumerate("abab")]
    for number, made in enumerate(runs):
        record_data(made, **(other if number > 1 else {}))
    runs.append(run({"dataset": "folder", "seed": 4, "data_dir": "/c"}))
    assert [group.runs for group in make_groups(runs)] == [runs[:2], runs[2:4], runs[4:]]


def test_the_number_of_labels_and_the_classes_are_those_of_the_file(run):
    few, many, other = run(), run(), run()
    (many.directory / "labelled.txt").write_text("0 zero\n1 one\n2 zero\n")
    (other.directory / "labelled.txt").write_text("a/x y.png cat\nb.png dog\n")
    groups = make_groups([few, read_run(many.directory), read_run(other.directory)])
    assert [group.title for group in groups] == ["A: num_labels 2", "B: num_labels 3", "C: num_labels 2"]


def test_what_a_stage_that_is_not_run_would_do_does_not_count(run):
    runs = [run({"stages": [1]}), run({"stages": [1], "stage2.epochs": 99, "stage3.lr": 9.0}), run()]
    short, whole = make_groups(runs)
    assert len(short.runs) == 2
    assert not any(name.startswith(("stage2.", "stage3.")) for name in short.settings)
    assert (short.title, whole.title) == ("A: stages 1", "B: stages 1,2,3")


def test_runs_from_the_stage_1_of_others_are_one_group_whichever_network_each_has(run):
    stages = {"stages": [2, 3]}
    runs = [run(stages | {"pretrained": f"stage1-{seed}.safetensors", "seed": seed}) for seed in (0, 1)]
    assert len(make_groups(runs)) == 1
    whole = [run({"pretrained": name}) for name in ("one", "other")]
    assert [group.difference for group in make_groups(whole)] == ["pretrained one", "pretrained other"]


def test_a_setting_that_older_runs_did_not_have_sets_them_apart(run):
    old = run()
    del old.config["stage2.repredict"]
    assert [group.title for group in make_groups([old, run()])] == ["A: digits", "B: stage2.repredict True"]


def test_other_methods_differ_in_their_names_and_those_of_one_method_in_their_settings(run):
    vat = {"method": "vat", "stages": [2], "optimizer": "adamw"}
    groups = make_groups([run(), run(vat), run(vat | {"unlabelled.eps": 2.5})])
    eps = [f"method vat; unlabelled.eps {value}" for value in (8.0, 2.5)]
    assert [group.difference for group in groups] == ["method r2d2", *eps]
    assert not any(name.startswith("unlabelled.") for name in groups[0].settings)


def test_there_are_letters_for_any_number_of_groups(run):
    groups = make_groups([run({"alpha": float(number)}) for number in range(28)])
    assert [group.letter for group in groups][-3:] == ["Z", "AA", "AB"]


def test_of_runs_with_one_seed_and_split_one_counts_and_the_others_are_told(run):
    runs = [run(), run(), run({"seed": 1}), run({"split_file": "a.txt"}), run({"split_file": "a.txt", "split": 7})]
    (group,) = make_groups(runs)
    assert group.counted == [runs[0], runs[2], runs[3]]
    assert len(group.results["stage 1"]) == 3
    assert results_table([group]).rows[0][-1] == "5 of 5, 3 counted"
    states = [row[3] for row in runs_table(group).rows]
    assert ["not counted: another run has its seed and split" in state for state in states] == [
        run not in group.counted for run in runs
    ]
    assert results_table(make_groups(runs[1:3])).rows[0][-1] == "2 of 2"


def test_results_are_those_of_the_last_epochs_of_finished_runs(run):
    errors = np.array([[60, 40, 30, 25, 20, 10], [50, 44, 38, 5, 23, 14], [9, 35, 28, 30, 27, 7]], float)
    pseudo = np.array([[28, 24, 18, 9], [3, 4, 22, 6], [20, 20, 14, 8]], float)
    finished = [
        run({"seed": seed}, made=rows(errors[seed].tolist(), pseudo[seed].tolist()), seconds=10.0 + seed)
        for seed in range(3)
    ]
    (group,) = make_groups([run({"seed": 9}, done=5), *finished])
    assert group.finished == finished
    expected = {
        "stage 1": errors[:, 1],
        "D2 only": errors[:, 2],
        "stage 2": errors[:, 4],
        "stage 3": errors[:, 5],
        "pseudo-labels": pseudo[:, 2],
        "seconds": np.array([10.0, 11.0, 12.0]),
    }
    assert list(group.results) == list(expected)
    for name, values in expected.items():
        assert group.results[name] == values.tolist()


@pytest.mark.parametrize("settings", [{"stage2.repredict_epochs": []}, {"stage2.repredict": False}])
def test_without_repredictions_stage_2_is_not_divided(run, settings):
    (group,) = make_groups([run(settings)])
    assert list(group.results) == ["stage 1", "stage 2", "stage 3", "pseudo-labels", "seconds"]


def test_top_5_errors_are_shown_where_there_are_any(run):
    made = run()
    for number, entry in enumerate(made.results["stages"]):
        entry["test_error_top5"] = 1.0 + number
    (group,) = make_groups([made])
    tops = {name: value for name, (value,) in group.results.items() if "top-5" in name}
    assert tops == {"stage 1, top-5": 1.0, "stage 2, top-5": 2.0, "stage 3, top-5": 3.0}


def test_a_pseudo_label_error_that_nobody_knows_is_left_out(run):
    (group,) = make_groups([run(made=rows(pseudo=[None] * 4))])
    assert "pseudo-labels" not in group.results
