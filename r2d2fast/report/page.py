"""The page: the whole report in one HTML file that needs no other file and no network."""

from datetime import datetime
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

import r2d2fast
from r2d2fast.report.curves import Figure, error_figures, overview_figures, pseudo_label_figures
from r2d2fast.report.gallery import Gallery, LoadImages, make_gallery
from r2d2fast.report.groups import Group
from r2d2fast.report.tables import Table, origin_table, results_table, runs_table, settings_table


class Section(NamedTuple):
    """What the page shows of a group."""

    group: Group
    runs: Table
    errors: list[Figure]
    pseudo_labels: list[Figure]
    gallery: Gallery
    origin: Table | None
    settings: Table


def make_page(groups: list[Group], left_out: list[str], load: LoadImages) -> str:
    """The page as text.

    Args:
        groups: at least one.
        left_out: a sentence for each run that could not be read.
        load: the data set of a run, for its gallery.
    """
    # Autoescape, because names of files, classes and settings may contain anything.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("page.html"))
    return template.render(
        heading=heading(groups),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=r2d2fast.__version__,
        left_out=left_out,
        results=results_table(groups),
        overview=overview_figures(groups),
        sections=[
            Section(
                group,
                runs_table(group),
                error_figures(group),
                pseudo_label_figures(group),
                make_gallery(group, load),
                origin_table(group),
                settings_table(group),
            )
            for group in groups
        ],
        style=_resource("style.css"),
    )


def make_markdown(groups: list[Group], left_out: list[str]) -> str:
    """The table of results as Markdown, and what was left out."""
    notes = "".join(f"\nLeft out: {reason}\n" for reason in left_out)
    return f"{results_table(groups).markdown()}{notes}"


def heading(groups: list[Group]) -> str:
    """How many runs there are."""
    runs = sum(len(group.runs) for group in groups)
    finished = sum(len(group.finished) for group in groups)
    return (
        f"{runs} run{'s' * (runs != 1)} of {len(groups)} configuration{'s' * (len(groups) != 1)}, {finished} finished"
    )


def _resource(name: str) -> str:
    return (files("r2d2fast.report") / name).read_text(encoding="utf-8")
