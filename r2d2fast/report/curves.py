"""Which curves a group of runs has."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from r2d2fast.report.groups import Group
from r2d2fast.report.runs import Run
from r2d2fast.report.svg import Chart, Points, Series, dot_chart
from r2d2fast.tables import mean_std
from r2d2fast.train.pictures import STAGE_TITLES


class Curve(NamedTuple):
    """A line of a chart: its name, the key of its values in a row of metrics, the factor to their unit, and that unit."""

    name: str
    key: str
    factor: float
    unit: str


ERRORS = (
    Curve("test error", "test_error", 1, " %"),
    Curve("pseudo-labels", "pseudo_label_error", 1, " %"),
)
CONFIDENCE = (
    Curve("predictions", "prediction_confidence", 100, " %"),
    Curve("pseudo-labels", "pseudo_confidence", 100, " %"),
)


class Figure(NamedTuple):
    """A chart as SVG, and what stands below it."""

    svg: str
    caption: str


def error_figures(group: Group) -> list[Figure]:
    """One for each stage that a run has begun, with one range of errors for all."""
    values = [row[curve.key] for run in group.runs for row in run.rows for curve in ERRORS if _has(row, curve)]
    figures = []
    for stage in group.settings["stages"]:
        title = STAGE_TITLES[stage]
        series = _series(group, stage, ERRORS)
        if series:
            marks = _marks(group, stage)
            y_range = (min(values), max(values))
            chart = Chart(title, series, "epochs", log=True, marks=marks, y_range=y_range)
            figures.append(
                Figure(chart.svg(), f"{_capital(title)}. Error in percent, logarithmic{_legend(group, marks)}")
            )
    return figures


def pseudo_label_figures(group: Group) -> list[Figure]:
    """Confidence, and what the paper's theorems say, of stage 2: those that the runs have measured."""
    marks = _marks(group, 2)
    legend = _legend(group, marks)
    wanted = (
        (
            CONFIDENCE,
            "Confidence on unlabelled samples",
            "mean of the largest probability, in percent. With class loss kl_reverse pseudo-labels end up flatter than "
            "predictions (Theorem 2); a reprediction sets them equal",
            ".1f",
        ),
        (
            (Curve("gap", "theorem1_gap", 1, ""),),
            "Theorem 1",
            "mean distance of the pseudo-label's probability of the predicted class from exp(−L/α) p̂^(1−β/α), to which it "
            "converges",
            ".3f",
        ),
        (
            (Curve("share", "theorem2_share", 100, " %"),),
            "Theorem 2",
            "share of samples, in percent, whose pseudo-label gives the predicted class no more than the prediction does; "
            "all of them, says the theorem, where training with class loss kl_reverse has converged",
            ".1f",
        ),
        (
            (Curve("drift", "sum_drift", 1, ""),),
            "Equation 13",
            "mean change of a sample's sum of pseudo-logits since the last prediction, which is rounding alone",
            ".1e",
        ),
    )
    figures = []
    for curves, title, explanation, form in wanted:
        series = _series(group, 2, curves)
        if series:
            chart = Chart(title, series, "epochs of stage 2", marks=marks, form=form)
            figures.append(Figure(chart.svg(), f"{title}: {explanation}{legend}"))
    return figures


def overview_figures(groups: list[Group]) -> list[Figure]:
    """The last test errors of all finished runs, a figure for each data set that has two or more."""
    figures = []
    for dataset in dict.fromkeys(group.settings["dataset"] for group in groups):
        shown = [group for group in groups if group.settings["dataset"] == dataset and group.finished]
        rows = []
        for group in shown:
            errors = [run.results["test_error"] for run in group.finished if run.results is not None]
            errors = [error for error in errors if error is not None]
            rows.append(
                (group.letter, errors, mean_std(group.results.get(f"stage {group.settings['stages'][-1]}", [])))
            )
        if sum(len(errors) for _, errors, _ in rows) > 1:
            title = f"{dataset}: test error (%)"
            figures.append(
                Figure(
                    dot_chart(title, rows, " %"),
                    f"Test error on {dataset} at the end of the last stage: a ring for each run, a bar for their mean.",
                )
            )
    return figures


def _series(group: Group, stage: int, curves: Sequence[Curve]) -> list[Series]:
    series = []
    for style, curve in enumerate(curves):
        lines = {id(run): _points(run, stage, curve) for run in group.runs}
        # Runs under way would make the mean jump where they end.
        counted = [lines[id(run)] for run in (group.finished or group.runs) if lines[id(run)]]
        mean = [(column[0][0], sum(y for _, y in column) / len(column)) for column in zip(*counted, strict=False)]
        if mean:
            runs = [line for line in lines.values() if line] if len(group.runs) > 1 else []
            series.append(Series(curve.name, mean, runs, style, curve.unit))
    return series


def _points(run: Run, stage: int, curve: Curve) -> Points:
    return [(row["epoch"] + 1, curve.factor * row[curve.key]) for row in run.rows_of(stage) if _has(row, curve)]


def _has(row: dict[str, Any], curve: Curve) -> bool:
    return row.get(curve.key) is not None


def _marks(group: Group, stage: int) -> list[float]:
    return sorted({row["epoch"] + 0.5 for run in group.runs for row in run.rows_of(stage) if row.get("repredicted")})


def _legend(group: Group, marks: list[float]) -> str:
    several = "; thick: mean of the runs, thin: each of them" if len(group.runs) > 1 else ""
    return f"{several}{'; R: reprediction' if marks else ''}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
