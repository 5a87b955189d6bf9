import pytest
from made_runs import make_run, rows

from r2d2fast.report import curves
from r2d2fast.report.curves import error_figures, overview_figures, pseudo_label_figures
from r2d2fast.report.groups import make_groups
from r2d2fast.report.runs import read_run


@pytest.fixture
def charts(monkeypatch):
    """The charts that were drawn, as they were described."""
    described = []

    class Recorded(curves.Chart):
        def svg(self):
            described.append(self)
            return super().svg()

    monkeypatch.setattr(curves, "Chart", Recorded)
    return described


def group_of(tmp_path, *runs):
    made = [make_run(tmp_path / str(seed), {"seed": seed}, **run) for seed, run in enumerate(runs)]
    (group,) = make_groups([read_run(directory) for directory in made])
    return group


def test_errors_by_stage_with_repredictions_marked(tmp_path, charts):
    figures = error_figures(group_of(tmp_path, {}))
    assert [chart.title for chart in charts] == ["stage 1: supervised", "stage 2: D2, then R2", "stage 3: fine-tuning"]
    one, two, three = charts
    assert [series.name for series in one.series] == ["test error"]
    assert one.series[0].points == [(1, 60.0), (2, 40.0)]
    assert [series.points for series in two.series] == [
        [(1, 30.0), (2, 25.0), (3, 20.0)],
        [(1, 28.0), (2, 24.0), (3, 18.0)],
    ]
    assert [chart.marks for chart in charts] == [[], [1.5], []]
    assert {(chart.log, chart.y_label) for chart in charts} == {(True, "error (%)")}
    assert figures[0].caption == "Stage 1: supervised. The scale is logarithmic."
    assert len({series.style for series in two.series}) == 2
    assert all(not series.runs for chart in charts for series in chart.series)
    assert three.series[0].points == [(1, 10.0)]


def test_the_mean_is_of_finished_runs_and_each_run_a_thin_line(tmp_path, charts):
    higher = rows([70.0, 50.0, 40.0, 35.0, 30.0, 20.0])
    figures = error_figures(group_of(tmp_path, {}, {"made": higher}, {"done": 1, "made": rows([99.0] * 6)}))
    series = charts[0].series[0]
    assert series.points == [(1, 65.0), (2, 45.0)]
    assert series.runs == [[(1, 60.0), (2, 40.0)], [(1, 70.0), (2, 50.0)], [(1, 99.0)]]
    assert "thick: mean of the runs" in figures[0].caption


def test_a_run_that_stops_early_ends_its_own_line_and_the_legend_has_the_mean_of_the_ends(tmp_path, charts):
    early = rows([60.0, 40.0, 35.0, 19.0, 99.0, 10.0])
    del early[4]
    late = rows([60.0, 40.0, 30.0, 25.0, 8.0, 10.0])
    figures = error_figures(group_of(tmp_path, {"made": early}, {"made": late}))
    series = charts[1].series[0]
    assert series.points == [(1, 32.5), (2, 22.0), (3, 8.0)]
    assert ">test error 13.5 %<" in figures[1].svg
    assert "test error ends at 13.5 %" in figures[1].svg
    assert "the legend has the mean of their last values" in figures[1].caption


def test_of_runs_that_are_not_finished_stages_begun_are_drawn(tmp_path, charts):
    error_figures(group_of(tmp_path / "begun", {"done": 3}, {"done": 4}))
    assert [chart.title for chart in charts] == ["stage 1: supervised", "stage 2: D2, then R2"]
    assert charts[1].series[0].points == [(1, 30.0)]
    group = group_of(tmp_path / "before", {"done": 0})
    assert (error_figures(group), pseudo_label_figures(group), overview_figures([group])) == ([], [], [])


def test_confidence_in_percent_and_no_theorems_where_they_were_not_measured(tmp_path, charts):
    pseudo_label_figures(group_of(tmp_path, {}))
    (chart,) = charts
    assert [series.points[-1] for series in chart.series] == [(3, pytest.approx(92.0)), (3, pytest.approx(82.0))]
    assert chart.marks == [1.5]


def test_theorems_are_drawn_where_they_were_measured(tmp_path, charts):
    made = rows()
    for row in made[2:5]:
        row |= {"theorem1_gap": 0.25, "theorem2_share": 0.75, "sum_drift": 2e-7}
    figures = pseudo_label_figures(group_of(tmp_path / "all", {"made": made}))
    assert [chart.title for chart in charts[1:]] == ["Theorem 1", "Theorem 2", "Equation 13"]
    assert [chart.series[0].points[-1] for chart in charts[1:]] == [(3, 0.25), (3, 75.0), (3, 2e-7)]
    assert all(chart.marks == [1.5] and chart.y_label for chart in charts)
    assert ">gap 0.250<" in figures[1].svg
    assert ">drift 2.0e-07<" in figures[3].svg
    for row in made[2:5]:
        row["theorem1_gap"] = None  # it is not about every class loss
    charts.clear()
    pseudo_label_figures(group_of(tmp_path / "some", {"made": made}))
    assert [chart.title for chart in charts[1:]] == ["Theorem 2", "Equation 13"]


def test_the_overview_compares_configurations_of_one_data_set(tmp_path):
    settings = [{}, {"seed": 1}, {"alpha": 0.5}, {"dataset": "mnist"}, {"alpha": 0.7}]
    made = [
        make_run(tmp_path / str(number), one, done=5 if "0.7" in str(one) else None)
        for number, one in enumerate(settings)
    ]
    figures = overview_figures(make_groups([read_run(directory) for directory in made]))
    (figure,) = figures  # a single run of mnist is nothing to compare
    assert "digits: test error (%): A, 10.00 ± 0.00 %; B, 10.00 %" in figure.svg
    assert figure.svg.count("fill-opacity: 0") == 3
