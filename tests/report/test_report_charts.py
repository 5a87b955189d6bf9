import itertools
import re
from xml.etree import ElementTree

import pytest

from r2d2fast.report.charts import SMALLEST, Chart, Series, dot_chart


def drawn(svg):
    root = ElementTree.fromstring(svg)
    return root, [element.text for element in root.iter("text")]


def thick(svg):
    """The points of the one thick line in the first colour."""
    (points,) = re.findall(r'd="([^"]*)" clip-path[^>]*stroke: var\(--s0\); stroke-width: 2;', svg)
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", points)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_line_goes_through_its_points_and_its_name_and_last_value_are_in_the_legend():
    series = Series("test <error>", [(0, 10.0), (5, 20.0), (10, 15.0)], unit=" %")
    svg = Chart("T & t", [series], "epochs", "error (%)").svg()
    root, texts = drawn(svg)
    (left, low), (middle, high), (right, last) = thick(svg)
    assert (middle - left, low - last) == pytest.approx((right - middle, last - high), abs=0.01)
    assert low > high
    assert {"test <error> 15.0 %", "epochs", "error (%)", "0", "2", "10"} <= set(texts)
    assert (root.get("role"), root.get("aria-label")) == ("img", "T & t: test <error> ends at 15.0 %")


def test_charts_of_one_page_share_no_names_and_need_nothing_from_elsewhere():
    one, other = (Chart("T", [Series("a", [(0, 1.0), (1, 2.0)])], "epochs", "y").svg() for _ in range(2))
    names, others = (set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, other))
    assert names
    assert not names & others
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', one)) <= {(n, "") for n in names} | {
        ("", n) for n in names
    }
    assert not re.search("http|<style|#0000", one)


def test_a_logarithmic_axis_has_a_place_for_zero_and_keeps_equal_ratios_equal():
    svg = Chart("T", [Series("error", [(0, 0.0), (1, 1.0), (2, 10.0), (3, 100.0)])], "epochs", "y", log=True).svg()
    heights = [y for _, y in thick(svg)]
    steps = [before - after for before, after in itertools.pairwise(heights)]
    assert steps == pytest.approx([2 * steps[1], steps[1], steps[1]], abs=0.01)
    assert {"0.01", "1", "10", "100"} <= set(drawn(svg)[1])
    assert SMALLEST == 0.01


@pytest.mark.parametrize("values", [[2.2, 2.5, 2.8], [0.012, 0.013], [30.1, 30.9, 90.0]])
def test_good_runs_can_be_told_apart_by_the_numbers_on_the_axis(values):
    _, texts = drawn(Chart("T", [Series("error", list(enumerate(values)))], "epochs", "y", log=True).svg())
    x_ticks = {str(number) for number in range(len(values))}
    assert len([text for text in texts if re.fullmatch(r"[\d.]+", text) and text not in x_ticks]) >= 2


@pytest.mark.parametrize("points", [[(1, 3.0)], [(1, 3.0), (2, 3.0)], [(1, 0.0), (2, 0.0)]])
@pytest.mark.parametrize("log", [False, True])
def test_one_value_alone_is_drawn_within_the_chart(points, log):
    svg = Chart("T", [Series("error", points)], "epochs", "y", log=log).svg()
    _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', svg)[1].split())
    assert all(0 < x < width and 0 < y < height for x, y in thick(svg))


def test_repredictions_are_marked_where_they_are():
    svg = Chart("T", [Series("a", [(1, 1.0), (11, 2.0)])], "epochs", "y", marks=[6, 11]).svg()
    root, texts = drawn(svg)
    (left, _), (right, _) = thick(svg)
    dotted = re.findall(r'd="M ([\d.]+) [^"]*"[^>]*stroke-dasharray: 1\.5', svg)
    assert [float(x) for x in dotted[:2]] == pytest.approx([(left + right) / 2, right], abs=0.01)
    assert texts.count("reprediction") == 1
    assert "repredictions at 6, 11" in root.get("aria-label")


def test_each_series_has_its_dashes_and_each_run_a_thin_line_of_the_same():
    runs = [[(0, 1.0), (1, 2.0)], [(0, 3.0), (1, 4.0)]]
    svg = Chart("T", [Series("a", runs[0]), Series("b", [(0, 2.0), (1, 3.0)], runs, style=1)], "epochs", "y").svg()
    lines = re.findall(r'clip-path[^>]*style="([^"]*stroke: var\(--s\d\)[^"]*)"', svg)
    assert ["dasharray" in line for line in lines] == [False, True, True, True]
    assert ["opacity" in line for line in lines] == [False, True, True, False]


def test_a_ring_for_each_run_and_a_bar_at_the_mean():
    svg = dot_chart("digits: test error", [("A", [1.0, 2.0, 8.0], "3.67 ± 3.79"), ("B", [4.0], "4.00")], " %")
    root, texts = drawn(svg)
    uses = [(float(use.get("x")), float(use.get("y")), use.get("style")) for use in root.iter("use")]
    (one, y, _), (two, _, _), (eight, _, _), (four, lower, _) = [use for use in uses if "fill-opacity: 0" in use[2]]
    assert (four - two, eight - four) == pytest.approx((two - one, two - one), abs=0.01)
    assert len([use for use in uses if "--s0" in use[2]]) == 2
    assert lower > y
    assert {"A", "B", "3.67 ± 3.79", "4.00", "digits: test error"} <= set(texts)
    assert root.get("aria-label") == "digits: test error: A, 3.67 ± 3.79 %; B, 4.00 %"
