"""``labels.txt``, the classes of some images of a folder, as people write it."""

import csv
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from r2d2fast.data.errors import DataError

LABEL_FILE = "labels.txt"
ACCEPTED = (
    "accepted: lines 'FILENAME CLASS', with a comma, a tab, a semicolon or spaces between them, UTF-8, with or without a line of "
    "headings"
)
_DELIMITERS = ("\t", ",", ";", " ")


class _Line(NamedTuple):
    number: int
    name: str
    label: str
    cells: int


def read_labels(path: Path, names: Collection[str], missing_ok: bool = False) -> dict[str, str]:
    """The class of each image that a file of labels names.

    The delimiter is the one by which most lines name an image; classes may have spaces in them. A first line that names none,
    and has no file name in it, is one of headings.

    Args:
        path: of the file.
        names: of the images there are, as paths below the file's folder with forward slashes.
        missing_ok: whether lines of other images are left out.

    Raises DataError, with the number of the line, for one that is no label, or is of an image that is not there.
    """
    known = set(names)
    try:
        text = path.read_text(encoding="utf-8-sig")  # which Windows begins with a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); {ACCEPTED}") from error
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n|\r|\n", text), 1) if line.strip()]
    read = [list(_lines(lines, delimiter, known)) for delimiter in _DELIMITERS]
    best = max(read, key=lambda parsed: sum(line.name in known for line in parsed))
    classes: dict[str, str] = {}
    for place, line in enumerate(best):
        where = f"{path}, line {line.number}"
        if line.name not in known and place == 0 and len(best) > 1 and not _is_a_file_name(line.name):
            continue
        if not line.name or not line.label or line.cells > 2:
            raise DataError(f"{where}: {dict(lines)[line.number]!r} is not 'FILENAME CLASS'; {ACCEPTED}")
        if line.name not in known:
            if missing_ok:
                continue
            raise DataError(f"{where}: {_missing(path.parent, line.name, known)}")
        if classes.setdefault(line.name, line.label) != line.label:
            raise DataError(
                f"{where}: {line.name!r} has class {line.label!r}, but {classes[line.name]!r} before; keep one"
            )
    return classes


def _lines(lines: list[tuple[int, str]], delimiter: str, known: set[str]) -> Iterator[_Line]:
    for number, line in lines:
        cells = _at_spaces(line, known) if delimiter == " " else next(csv.reader([line], delimiter=delimiter))
        name, label = (cell.strip() for cell in [*cells, ""][:2])
        yield _Line(number, _plain(name) if _plain(name) in known else name, label, len(cells))


def _plain(name: str) -> str:
    """A path as Windows, or ``find``, writes it, as the data set has it."""
    return name.replace("\\", "/").removeprefix("./")


def _at_spaces(line: str, known: set[str]) -> list[str]:
    """Name and class; file names and classes may have spaces in them, and where both do it is the name that is known."""
    spaces = [place.start() for place in re.finditer(r"\s", line)]
    cuts = [(line[:place].strip(), line[place:].strip()) for place in reversed(spaces)]
    return list(next((cut for cut in cuts if _plain(cut[0]) in known), cuts[0] if cuts else (line,)))


def _is_a_file_name(word: str) -> bool:
    return bool(os.path.splitext(word)[1]) or "/" in word


def _missing(folder: Path, name: str, known: set[str]) -> str:
    if (folder / name).is_file():
        return f"{name!r} is of a kind that is not read; convert the image to .jpg or .png, or remove the line"
    like = f"; the images there have names like {min(known)!r}" if known else ""
    return f"{name!r} is not there; remove the line, or add the image below {folder}{like}"
