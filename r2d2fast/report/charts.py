"""Charts as SVG inside the page, drawn by matplotlib; colours and fonts are the page's, so that they follow its scheme.

Series differ in dashes as well as in colour, so that no chart needs colour vision.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from r2d2fast.train.pictures import mark_repredictions

# What matplotlib draws in these colours, the style sheet colours by the variable beside each.
INK, FAINT, RULE = "#00000a", "#00000b", "#00000c"
SERIES = ("#000000", "#000001")
VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule", **{colour: f"--s{n}" for n, colour in enumerate(SERIES)}}
DASHES = ("-", "--")
SMALLEST = 0.01  # what is drawn in the place of smaller values on a logarithmic axis, which has no place for 0
STYLE: dict[Any, Any] = {
    **{
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": INK,
    },
    **{
        "axes.labelcolor": FAINT,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "grid.color": RULE,
    },
    **{
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.columnspacing": 1,
        "legend.handlelength": 2.2,
    },
}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line with a name.

    Attributes:
        name: what the legend calls it, with ``last``.
        points: (x, y) from left to right, of the mean of the runs; at least one.
        runs: the same of each run, drawn thin; none where the mean is that of one run.
        style: number of its dashes and colour, 0 or 1.
        unit: what follows that value in the legend.
        last: the value at the end; None takes that of the last point, which is not the runs' mean where some end before others.
    """

    name: str
    points: Points
    runs: Sequence[Points] = ()
    style: int = 0
    unit: str = ""
    last: float | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over the epochs of a stage.

    Attributes:
        title: what screen readers call it.
        series: the lines.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis measures, and its unit.
        log: whether the vertical axis is logarithmic.
        marks: places of the vertical lines.
        form: of the values in the legend, as format() takes it.
    """

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    log: bool = False
    marks: Sequence[float] = ()
    form: str = ".1f"

    def svg(self) -> str:
        """The chart as an SVG element. Its last values are the text that screen readers read in its place."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(5.5, 3.8), layout="constrained")
            axis = figure.subplots()
            for series in self.series:
                look: dict[str, Any] = {"color": SERIES[series.style], "linestyle": DASHES[series.style]}
                for run in series.runs:
                    axis.plot(*_columns(run, self.log), linewidth=0.8, alpha=0.5, **look)
                marker = "o" if len(series.points) == 1 else ""
                label = f"{series.name} {self._value(series)}"
                axis.plot(*_columns(series.points, self.log), linewidth=2, marker=marker, label=label, **look)
            mark_repredictions(axis, self.marks, FAINT)
            axis.set(xlabel=self.x_label, ylabel=self.y_label)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if self.log:
                _logarithmic(
                    axis.yaxis, [y for series in self.series for line in (series.points, *series.runs) for _, y in line]
                )
            axis.grid(axis="y")
            figure.legend(loc="outside upper left", ncols=3)
            return _element(figure, self._alternative())

    def _value(self, series: Series) -> str:
        last = series.points[-1][1] if series.last is None else series.last
        return f"{last:{self.form}}{series.unit}"

    def _alternative(self) -> str:
        ends = [f"{series.name} ends at {self._value(series)}" for series in self.series]
        marks = f"; repredictions at {', '.join(f'{mark:g}' for mark in self.marks)}" if self.marks else ""
        return f"{self.title}: {'; '.join(ends)}{marks}"


def dot_chart(title: str, rows: Sequence[tuple[str, Sequence[float], str]], unit: str) -> str:
    """A chart with a row for each (name, values, text): a ring for each value, a bar for the mean, and the text at the right.

    Its axis is logarithmic, so that good runs can be told apart beside one that failed.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 1 + 0.35 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for place, (_, values, text) in enumerate(rows):
            shown = [max(value, SMALLEST) for value in values]
            axis.plot(shown, [place] * len(values), "o", color=SERIES[1], fillstyle="none")
            axis.plot([sum(shown) / len(shown)], [place], "|", color=SERIES[0], markersize=16, markeredgewidth=2.5)
            axis.text(1.03, place, text, transform=axis.get_yaxis_transform(), va="center")
        axis.set(xlabel=title, ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontweight="bold", color=INK)
        _logarithmic(axis.xaxis, [value for _, values, _ in rows for value in values])
        axis.grid(axis="x")
        return _element(figure, f"{title}: " + "; ".join(f"{name}, {text}{unit}" for name, _, text in rows))


def _columns(points: Points, log: bool) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [max(y, SMALLEST) if log else y for _, y in points]


def _logarithmic(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic scale about ``values``, with ticks at round numbers however near the values are to each other."""
    low, high = max(min(values), SMALLEST), max(*values, SMALLEST)
    axis._set_axes_scale("log")  # type: ignore[attr-defined]
    axis.set_view_interval(0.9 * low, 1.1 * high, ignore=True)
    round_numbers = (1, 2, 3, 5) if high < 100 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=round_numbers) if high > 4 * low else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _element(figure: Figure, alternative: str) -> str:
    """The figure as an element for a page that holds others like it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(r"^<svg[^>]*>", lambda _: f'<svg {box[0]} role="img" aria-label={quoteattr(alternative)}>', svg)
    # A style sheet for everything on the page, and the names of groups, which every figure has and nothing refers to.
    svg = re.sub(r'\s*<defs>\s*<style.*?</defs>| id="[\w.]+_\d+"', "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("xlink:href", "href").strip()
