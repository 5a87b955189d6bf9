"""Charts as SVG inside the page: colours and fonts are the page's, so that they follow its light or dark scheme.

Series differ in dashes as well as in colour and carry their names at their ends, so that no chart needs colour vision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from matplotlib.ticker import MaxNLocator

# A unit is about a pixel on a phone, where a chart is as wide as the screen.
WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 118, 22, 38
LABEL_HEIGHT = 14
ROW_HEIGHT = 26
LOG_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line with a name.

    Attributes:
        name: what stands at its end.
        points: (x, y) from left to right, of the mean of the runs.
        runs: the same of each run, drawn thin; none where the mean is that of one run.
        style: number of its dashes and colour, 0 … 3, as the style sheet has them.
        unit: what follows the last value in the label.
    """

    name: str
    points: Points
    runs: Sequence[Points] = ()
    style: int = 0
    unit: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over the epochs of a stage.

    Attributes:
        title: what stands above.
        series: the lines; some point there must be.
        x_label: what the horizontal axis counts.
        log: whether the vertical axis is logarithmic; values below its smallest tick are drawn there.
        marks: places of the vertical lines.
        y_range: least values that the vertical axis holds.
        form: of the values in the labels, as format() takes it.
    """

    title: str
    series: Sequence[Series]
    x_label: str
    log: bool = False
    marks: Sequence[float] = ()
    y_range: tuple[float, float] | None = None
    form: str = ".1f"

    def svg(self) -> str:
        """The chart as an SVG element. Its last values are the text that screen readers read in its place."""
        lines = [line for series in self.series for line in (series.points, *series.runs)]
        xs = [x for line in lines for x, _ in line]
        ys = [y for line in lines for _, y in line] + list(self.y_range or ())
        x_ticks = _ticks(0, max(xs), integer=True)
        y_ticks = _log_ticks(min(ys), max(ys)) if self.log else _ticks(min(ys), max(ys))
        across = _Scale(0, max(xs), LEFT, WIDTH - RIGHT)
        up = _Scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), HEIGHT - BOTTOM, TOP, self.log)
        root = _root(WIDTH, HEIGHT, self._alternative())
        for tick in y_ticks:
            _line(root, "grid", LEFT, up(tick), WIDTH - RIGHT, up(tick))
            _text(root, "tick end", LEFT - 6, up(tick) + 4, _short(f"{tick:g}"))
        for tick in x_ticks:
            _text(root, "tick middle", across(tick), HEIGHT - BOTTOM + 16, f"{tick:g}")
        _line(root, "axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
        _text(root, "tick middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, self.x_label)
        for mark in self.marks:
            _line(root, "mark", across(mark), TOP, across(mark), HEIGHT - BOTTOM)
            _text(root, "tick middle", across(mark), TOP - 6, "R")
        for series in self.series:
            for run in series.runs:
                _path(root, f"line thin s{series.style}", [(across(x), up(y)) for x, y in run])
            _path(root, f"line s{series.style}", [(across(x), up(y)) for x, y in series.points])
        ended = [series for series in self.series if series.points]
        wanted = [up(series.points[-1][1]) for series in ended]
        for series, place, at in zip(
            ended, spread(wanted, TOP + 4, HEIGHT - BOTTOM - LABEL_HEIGHT), wanted, strict=True
        ):
            x = WIDTH - RIGHT + 22
            end = across(series.points[-1][0])
            _path(root, f"line s{series.style} leader", [(end, at), (x - 4, place)])
            _text(root, "label", x, place, series.name)
            _text(root, "label strong", x, place + LABEL_HEIGHT - 1, self._value(series))
        return _string(root)

    def _value(self, series: Series) -> str:
        return _short(f"{series.points[-1][1]:{self.form}}{series.unit}")

    def _alternative(self) -> str:
        ends = [f"{series.name} ends at {self._value(series)}" for series in self.series if series.points]
        marks = f"; repredictions at {', '.join(f'{mark:g}' for mark in self.marks)}" if self.marks else ""
        return f"{self.title}: {'; '.join(ends)}{marks}"


def dot_chart(title: str, rows: Sequence[tuple[str, Sequence[float], str]], unit: str) -> str:
    """A chart with a row for each (name, values, text): a ring for each value, a bar for the mean, and the text at the right."""
    values = [value for _, row, _ in rows for value in row]
    ticks = _ticks(min(values), max(values))
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    across = _Scale(min(ticks[0], *values), max(ticks[-1], *values), LEFT, WIDTH - RIGHT)
    root = _root(WIDTH, height, f"{title}: " + "; ".join(f"{name}, {text}{unit}" for name, _, text in rows))
    for tick in ticks:
        _line(root, "grid", across(tick), TOP - 6, across(tick), height - BOTTOM)
        _text(root, "tick middle", across(tick), height - BOTTOM + 16, f"{tick:g}")
    _text(root, "tick middle", (LEFT + WIDTH - RIGHT) / 2, height - 4, title)
    for number, (name, row, text) in enumerate(rows):
        y = TOP + ROW_HEIGHT * (number + 0.5)
        mean = sum(row) / len(row)
        _text(root, "label strong end", LEFT - 12, y + 4, name)
        _line(root, "mean", across(mean), y - 9, across(mean), y + 9)
        for value in row:
            SubElement(root, "circle", {"class": "dot", "cx": _number(across(value)), "cy": _number(y), "r": "4.5"})
        _text(root, "label", WIDTH - RIGHT + 12, y + 4, text)
    return _string(root)


def spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Positions for labels of two lines so that none covers another.

    They are in the order of the wanted positions and near them, between ``low`` and ``high`` as far as they fit.
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    height = 2 * LABEL_HEIGHT + 2
    places = list(wanted)
    limit = low
    for number in order:
        places[number] = limit = max(wanted[number], limit)
        limit += height
    limit = max(high, low + height * (len(order) - 1))
    for number in reversed(order):
        places[number] = limit = min(places[number], limit)
        limit -= height
    return places


@dataclass(frozen=True)
class _Scale:
    """Maps values to positions in the chart."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._linear(number) for number in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return math.log(max(value, LOG_TICKS[0])) if self.log else value


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """Round numbers that enclose ``low`` and ``high``; on an integer axis, those between them."""
    if high == low:
        low, high = low - 0.5 * (not integer), high + 0.5
    values = [
        float(value) for value in MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=integer).tick_values(low, high)
    ]
    return [value for value in values if low <= value <= high] if integer else values


def _log_ticks(low: float, high: float) -> list[float]:
    start = max([number for number, tick in enumerate(LOG_TICKS) if tick <= low], default=0)
    end = next((number for number, tick in enumerate(LOG_TICKS) if tick >= high), len(LOG_TICKS) - 1)
    return list(LOG_TICKS[start : max(end, start + 1) + 1])


def _root(width: float, height: float, alternative: str) -> Element:
    box = f"0 0 {_number(width)} {_number(height)}"
    return Element("svg", {"viewBox": box, "role": "img", "aria-label": alternative})


def _line(root: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(root, "line", {"class": kind} | {name: _number(place) for name, place in places.items()})


def _path(root: Element, kind: str, points: Points) -> None:
    if points:
        steps = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        SubElement(root, "path", {"class": kind, "d": f"M{steps}"})
    if len(points) == 1 and "thin" not in kind:
        (x, y) = points[0]
        SubElement(root, "circle", {"class": f"dot {kind}", "cx": _number(x), "cy": _number(y), "r": "3"})


def _text(root: Element, kind: str, x: float, y: float, text: str) -> None:
    SubElement(root, "text", {"class": kind, "x": _number(x), "y": _number(y)}).text = text


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _short(number: str) -> str:
    return number.replace("e-0", "e-")


def _string(root: Element) -> str:
    return tostring(root, encoding="unicode", short_empty_elements=False)
