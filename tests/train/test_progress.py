"""The progress bar, on terminals of several widths."""

import io
import re

import pytest
import rich.progress
from rich.console import Console

from r2d2fast.train.progress import Reporter
from r2d2fast.train.schedule import make_schedule
from tests.train.small_data import CONFIG

ROW = {
    "train_loss": 0.12345,
    "test_error": 12.345,
    "pseudo_label_error": 12.5,
    "images_per_second": 12345.6,
    "lr": 0.02,
}


@pytest.mark.parametrize("width", [60, 80, 130])
def test_bar_and_time_have_room(width, monkeypatch):
    monkeypatch.setattr(rich.progress.Task, "time_remaining", property(lambda task: 88 * 3600 + 61))
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    schedule = make_schedule(CONFIG, 8, 112)
    reporter = Reporter(console, schedule, 0)

    def shown():
        with console.capture() as capture:
            console.print(reporter.bar.get_renderable())
        (line,) = capture.get().splitlines()
        assert re.fullmatch(r"stage.*\S [━╸╺ ]{10,} *\d+ % 88:01:01", line)
        return line

    assert shown().startswith("stage 1 epoch 1/2 ")
    reporter.epoch_ended(schedule[0], ROW)
    line = shown()
    assert line.startswith(
        "stage 1 epoch 1/2  loss 0.1235  error" if width > 80 else "stage 1 epoch 1/2  error 12.35 % "
    )
    assert " 8 % " in line


def test_the_line_at_the_end_of_a_stage_ends_between_words():
    file = io.StringIO()
    console = Console(width=40, force_terminal=True, color_system=None, file=file)
    schedule = make_schedule(CONFIG, 8, 112)
    Reporter(console, schedule, 0).epoch_ended(schedule[1], ROW)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 40
    assert " ".join(" ".join(lines).split()) == (
        "stage 1 epoch 2/2 loss 0.1235 error 12.35 % 12346 images/s pseudo-label error 12.50 % lr 0.02"
    )
