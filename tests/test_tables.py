import re

import numpy as np
import pytest

from r2d2fast.tables import markdown_table, mean_std


@pytest.mark.parametrize("count", [2, 3, 7])
def test_mean_and_sample_deviation(count):
    values = np.random.default_rng(count).uniform(0, 100, count)
    assert mean_std(values.tolist()) == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    assert mean_std(values.tolist(), digits=0) == f"{values.mean():.0f} ± {values.std(ddof=1):.0f}"


def test_one_value_has_no_deviation_and_none_is_a_dash():
    assert (mean_std([3.0]), mean_std([])) == ("3.00", "–")


def test_columns_line_up_and_no_text_breaks_a_row():
    evil = '<script>alert("1")</script>|`&\'\n<img src=x>'
    lines = markdown_table(["a", "long heading"], [[evil, "x\\|y"], ["", "1"]]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert [len(re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines] == [2] * 4
    assert "<" not in lines[2]
    assert lines[2].endswith(r"| x\\\|y       |")  # a bare backslash would undo the one before the bar
    assert re.fullmatch(r"\| -+ \| -{12} \|", lines[1])
