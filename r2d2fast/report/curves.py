"""The charts of a group of runs: which curves there are, and what stands below them."""

from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

from r2d2fast.report.charts import Chart, Points, Series, dot_chart
from r2d2fast.report.groups import Group
from r2d2fast.report.runs import Run
from r2d2fast.tables import mean_std
from r2d2fast.train.pictures import reprediction_places, stage_title


class Curve(NamedTuple):
    """A line of a chart: its name, the key of its values in a row of metrics, the factor to their unit, and that unit."""

    name: str
    key: str
    factor: float
    unit: str


ERRORS = (Curve("test error", "test_error", 1, " %"), Curve("pseudo-labels", "pseudo_label_error", 1, " %"))
CONFIDENCE = (
    Curve("predictions", "prediction_confidence", 100, " %"),
    Curve("pseudo-labels", "pseudo_confidence", 100, " %"),
)


class Figure(NamedTuple):
    """A chart as SVG, and what stands below it."""

    svg: str
    caption: str


def error_figures(group: Group) -> list[Figure]:
    """A figure for each stage that a run has begun."""
    figures = []
    for stage in group.settings["stages"]:
        series = _series(group, stage, ERRORS)
        if series:
            title = stage_title(stage, group.settings.get("method", "r2d2"))
            chart = Chart(title, series, "epochs", "error (%)", log=True, marks=_marks(group, stage))
            figures.append(
                Figure(chart.svg(), f"{title[0].upper() + title[1:]}. The scale is logarithmic{_legend(group)}")
            )
    return figures


def pseudo_label_figures(group: Group) -> list[Figure]:
    """Figures of stage 2: confidence, and what the paper's theorems are about, as far as the runs have measured it."""
    marks = _marks(group, 2)
    legend = _legend(group)
    wanted = (
        (
            CONFIDENCE,
            "Confidence on unlabelled samples",
            "confidence (%)",
            "mean of the largest probability, in percent. With class loss kl_reverse pseudo-labels end up flatter than "
            "predictions (Theorem 2); a reprediction sets them equal",
            ".1f",
        ),
        (
            (Curve("gap", "theorem1_gap", 1, ""),),
            "Theorem 1",
            "gap in probability",
            "mean distance of the pseudo-label's probability of the predicted class from exp(−L/α) p̂^(1−β/α), to which it "
            "converges",
            ".3f",
        ),
        (
            (Curve("share", "theorem2_share", 100, " %"),),
            "Theorem 2",
            "share of samples (%)",
            "share of samples, in percent, whose pseudo-label gives the predicted class no more than the prediction does; "
            "all of them, says the theorem, where training with class loss kl_reverse has converged",
            ".1f",
        ),
        (
            (Curve("drift", "sum_drift", 1, ""),),
            "Equation 13",
            "change of a sum",
            "mean change of a sample's sum of pseudo-logits since the last prediction, which is rounding alone",
            ".1e",
        ),
    )
    figures = []
    for curves, title, unit, explanation, form in wanted:
        series = _series(group, 2, curves)
        if series:
            chart = Chart(title, series, "epochs of stage 2", unit, marks=marks, form=form)
            figures.append(Figure(chart.svg(), f"{title}: {explanation}{legend}"))
    return figures


def overview_figures(groups: list[Group]) -> list[Figure]:
    """The last test errors of all finished runs: a figure for each data set that has at least two of them."""
    figures = []
    for dataset in dict.fromkeys(group.settings["dataset"] for group in groups):
        shown = [group for group in groups if group.settings["dataset"] == dataset and group.finished]
        rows = []
        for group in shown:
            errors = [run.results["test_error"] for run in group.finished if run.results is not None]
            errors = [error for error in errors if error is not None]
            if errors:
                rows.append((group.letter, errors, mean_std(errors)))
        if sum(len(errors) for _, errors, _ in rows) > 1:
            title = f"{dataset}: test error (%)"
            figures.append(
                Figure(
                    dot_chart(title, rows, " %"),
                    f"Test error on {dataset} at the end of the last stage: a ring for each run, a bar for their mean; "
                    "the scale is logarithmic.",
                )
            )
    return figures


def _series(group: Group, stage: int, curves: Sequence[Curve]) -> list[Series]:
    series = []
    for style, curve in enumerate(curves):
        lines = {id(run): _points(run, stage, curve) for run in group.runs}
        # Finished runs, each to its own end, which may be an early one. Those under way say nothing of the end: they count where
        # none is finished, and as far as all of them have come.
        counted = [lines[id(run)] for run in (group.counted or group.runs) if lines[id(run)]]
        if not group.counted:
            counted = [line[: min(map(len, counted))] for line in counted]
        if counted:
            runs = [line for line in lines.values() if line] if len(group.runs) > 1 else []
            last = fmean(line[-1][1] for line in counted)
            series.append(Series(curve.name, _mean(counted), runs, style, curve.unit, last))
    return series


def _mean(lines: Sequence[Points]) -> Points:
    """At each epoch, of the lines that have it."""
    values: dict[float, list[float]] = {}
    for epoch, value in chain(*lines):
        values.setdefault(epoch, []).append(value)
    return [(epoch, fmean(values[epoch])) for epoch in sorted(values)]


def _points(run: Run, stage: int, curve: Curve) -> Points:
    return [(row["epoch"] + 1, curve.factor * row[curve.key]) for row in run.rows_of(stage) if _has(row, curve)]


def _has(row: dict[str, Any], curve: Curve) -> bool:
    return row.get(curve.key) is not None


def _marks(group: Group, stage: int) -> list[float]:
    return reprediction_places([row for run in group.runs for row in run.rows_of(stage)])


def _legend(group: Group) -> str:
    if len(group.runs) == 1:
        return "."
    return "; thick: mean of the runs that have the epoch, thin: each of them; the legend has the mean of their last values."
