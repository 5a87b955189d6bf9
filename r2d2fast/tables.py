"""Results as text, written in one way wherever they are shown."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console

NO_VALUE = "–"


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± sample standard deviation`` (n − 1); a single value alone, and a dash for none."""
    if not values:
        return NO_VALUE
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number} {noun}" + "s" * (number != 1)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line: on a terminal broken between words, in a file or a pipe in one piece."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def probability(value: float) -> str:
    """Of six digits, as files have it: that of a float32 softmax is not better."""
    return f"{value:.6g}"


def csv_rows(rows: Iterable[Sequence[str]]) -> bytes:
    """Lines of a CSV file in UTF-8, with quotes where a cell needs them; file names that are no text are kept (PEP 383)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up when it is read as text; every cell is escaped by :func:`markdown`."""
    lines = [[markdown(cell) for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def markdown(text: str) -> str:
    """``text`` without anything that Markdown would read as the end of a cell or a line, as code, or as a tag."""
    for character, instead in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("\n", " "), ("\r", " ")):
        text = text.replace(character, instead)
    return text
