"""The command line: ``python -m r2d2fast.report``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from r2d2fast.command import as_called
from r2d2fast.help_texts import description, with_help_texts
from r2d2fast.report.errors import ReportError
from r2d2fast.report.gallery import image_loader
from r2d2fast.report.groups import make_groups
from r2d2fast.report.page import heading, make_markdown, make_page
from r2d2fast.report.runs import find_runs, read_run
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.files import write_atomically

PROGRAM = as_called("report")


@with_help_texts
@dataclass(frozen=True)
class Arguments:
    """Report on any set of runs of the trainer, finished or not: one HTML page that needs no network, and beside
    it a Markdown table. Runs that differ in nothing but seed and split are one configuration, of which mean and standard
    deviation are given."""

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")]
    """Run directories, or directories that hold some."""

    output: Path = Path("report.html")
    """File of the page; the table is written beside it with the suffix .md."""

    data_dir: Path = Path("data")
    """Directory of the data sets, as of the trainer, for the pictures of samples."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), write the report, and return the exit status.

    0: done; 1: no report, or one that lacks runs that could not be read, which are named; 2: the command line does not fit.
    """
    chosen = tyro.cli(Arguments, args=arguments, prog=PROGRAM, description=description(Arguments))
    if not chosen.directories or chosen.output.suffix == ".md":
        wrong = (
            f"--output {chosen.output}: that is the table's name" if chosen.directories else "no run directory named"
        )
        print(f"{PROGRAM}: {wrong}; for example {PROGRAM} runs --output report.html", file=sys.stderr)
        return 2
    try:
        left_out = _report(chosen)
    except ReportError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 1 if left_out else 0


def _report(chosen: Arguments) -> list[str]:
    """Write the report. Returns a sentence for each run that could not be read, after printing it."""
    runs, left_out = [], []
    for directory in find_runs(chosen.directories):
        try:
            runs.append(read_run(directory))
        except ReportError as error:
            left_out.append(f"{directory}: {error}")
            print(f"{PROGRAM}: left out: {error}", file=sys.stderr)
    if not runs:
        raise ReportError("none of the runs could be read, so there is nothing to report")
    groups = make_groups(runs)
    table = chosen.output.with_suffix(".md")
    _write(table, make_markdown(groups, left_out))
    _write(chosen.output, make_page(groups, left_out, image_loader(chosen.data_dir)))
    print(f"{heading(groups)}: {chosen.output}, {table}")
    return left_out


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names that are not valid text contain surrogates, which UTF-8 cannot encode.
        write_atomically(path, text.encode(errors="backslashreplace"))
    except (OSError, TrainingError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        raise ReportError(f"cannot write {path}: {reason}; free some space, or name another --output") from error
