import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from r2d2fast.report.svg import BOTTOM, HEIGHT, LABEL_HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, dot_chart, spread


def drawn(svg):
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("text")]
    paths = {}
    for path in root.iter("path"):
        numbers = [float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
        paths.setdefault(path.get("class"), []).append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return root, texts, paths


def test_a_line_goes_through_its_points_and_ends_with_its_name_and_value():
    series = Series("test <error>", [(0, 10.0), (5, 20.0), (10, 15.0)], unit=" %")
    root, texts, paths = drawn(Chart("T & t", [series], "epochs", y_range=(10.0, 20.0)).svg())
    bottom, top = HEIGHT - BOTTOM, TOP
    expected = [(LEFT, bottom), ((LEFT + WIDTH - RIGHT) / 2, top), (WIDTH - RIGHT, (top + bottom) / 2)]
    assert paths["line s0"] == [[pytest.approx(point, abs=0.06) for point in expected]]
    assert texts[-2:] == ["test <error>", "15.0 %"]
    assert {"0", "2", "4", "6", "8", "10", "12", "14", "16", "18", "20", "epochs"} <= set(texts)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "T & t: test <error> ends at 15.0 %"


def test_on_a_logarithmic_axis_equal_ratios_are_equal_distances():
    series = Series("error", [(0, 1.0), (1, 10.0), (2, 100.0)])
    _, texts, paths = drawn(Chart("T", [series], "epochs", log=True).svg())
    ((_, one), (_, ten), (_, hundred)) = paths["line s0"][0]
    assert one - ten == pytest.approx(ten - hundred, abs=0.2)
    assert one > ten > hundred
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(texts)


def test_an_error_of_zero_has_a_place_on_a_logarithmic_axis():
    _, _, paths = drawn(Chart("T", [Series("error", [(0, 50.0), (1, 0.0)])], "epochs", log=True).svg())
    assert paths["line s0"][0][1][1] == pytest.approx(HEIGHT - BOTTOM)


def test_errors_far_below_a_percent_have_places_of_their_own():
    _, texts, paths = drawn(Chart("T", [Series("error", [(0, 0.01), (1, 0.05), (2, 1.0)])], "epochs", log=True).svg())
    assert [texts[0], texts[2]] == ["0.01", "0.05"]
    heights = [y for _, y in paths["line s0"][0]]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3


def test_labels_of_small_numbers_fit_beside_the_axis():
    _, texts, _ = drawn(Chart("T", [Series("drift", [(0, 0.0), (1, 1.3e-6)])], "epochs", form=".1e").svg())
    ticks = [text for text in texts if "e-" in text]
    assert {"5e-7", "1.3e-6"} <= set(ticks)
    assert max(map(len, ticks)) <= 6


@pytest.mark.parametrize("points", [[(1, 3.0)], [(1, 3.0), (2, 3.0)], [(1, 0.0), (2, 0.0)]])
@pytest.mark.parametrize("log", [False, True])
def test_one_value_alone_is_drawn_within_the_chart(points, log):
    root, _, _ = drawn(Chart("T", [Series("error", points)], "epochs", log=log).svg())
    numbers = [
        float(element.get(name)) for element in root.iter() for name in ("x", "y", "cx", "cy") if element.get(name)
    ]
    assert all(0 <= number <= max(WIDTH, HEIGHT) for number in numbers)
    assert ("circle" in {element.tag for element in root.iter()}) == (len(points) == 1)


def test_repredictions_are_marked_where_they_are():
    root, texts, _ = drawn(Chart("T", [Series("a", [(1, 1.0), (11, 2.0)])], "epochs", marks=[5.5, 11]).svg())
    marks = [float(line.get("x1")) for line in root.iter("line") if line.get("class") == "mark"]
    assert marks == pytest.approx([(LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    assert texts.count("R") == 2
    assert "repredictions at 5.5, 11" in root.get("aria-label")


def test_each_series_has_its_dashes_and_each_run_a_thin_line_of_the_same():
    runs = [[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 4.0)]]
    series = [Series("a", runs[0]), Series("b", [(0, 2.0), (1, 3.0)], runs, style=1)]
    _, _, paths = drawn(Chart("T", series, "epochs").svg())
    assert (len(paths["line s0"]), len(paths["line s1"]), len(paths["line thin s1"])) == (1, 1, 2)
    assert "line thin s0" not in paths


@pytest.mark.parametrize("wanted", [[50.0], [50.0, 51.0], [90.0, 90.0, 90.0], [1.0, 99.0, 2.0], [100.0, 0.0]])
def test_labels_keep_apart_in_order_and_within_the_chart(wanted):
    places = spread(wanted, 0.0, 100.0)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    for upper, lower in pairwise(order):
        assert places[lower] - places[upper] >= 2 * LABEL_HEIGHT
    assert min(places) >= 0.0
    assert max(places) <= 100.0


def test_labels_far_apart_stand_where_their_lines_end():
    assert spread([80.0, 10.0], 0.0, 100.0) == [80.0, 10.0]


def test_a_dot_for_each_run_and_a_bar_at_the_mean():
    rows = [("A", [1.0, 2.0, 6.0], "3.00 ± 2.65"), ("B", [4.0], "4.00")]
    root, texts, _ = drawn(dot_chart("digits: test error", rows, " %"))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    bars = [float(line.get("x1")) for line in root.iter("line") if line.get("class") == "mean"]
    (one, y), (two, _), (six, _), (four, lower) = dots
    assert (two - one) * 4 == pytest.approx(six - two, abs=0.5)
    assert bars == pytest.approx([(one + two + six) / 3, four], abs=0.1)
    assert lower > y
    assert {"A", "B", "3.00 ± 2.65", "4.00"} <= set(texts)
    assert root.get("aria-label") == "digits: test error: A, 3.00 ± 2.65 %; B, 4.00 %"
