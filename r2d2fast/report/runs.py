"""Run directories as they are found: finished, under way, stopped or damaged."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from r2d2fast.report.errors import ReportError
from r2d2fast.train.run_directory import CONFIG, METRICS, RESULTS, SPLIT

# What is read of a configuration, an epoch and a result, without which nothing could be said of the run.
_SETTINGS = {"dataset": str, "seed": int, "split": int, "num_labels": int, "stages": list}
Kinds = Mapping[str, type | UnionType]
# A test error is None where there are no test data.
_TEST_ERROR = float | None
_OF_AN_EPOCH: Kinds = {"stage": int, "epoch": int, "test_error": _TEST_ERROR}
_OF_A_STAGE: Kinds = {"stage": int, "epochs": int, "test_error": _TEST_ERROR}
_WAY_OUT = "restore it, or leave the run out"


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        directory: where.
        config: the settings by the name of their flag, as in ``config.json``.
        rows: of ``metrics.jsonl``, one an epoch.
        results: of ``results.json``; None for a run that is not finished.
        labelled: number of labelled samples, from ``labelled.txt``; before it is written, as the configuration asks.
        classes: their classes, as that file has them.
    """

    directory: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any] | None
    labelled: int
    classes: frozenset[str]

    @property
    def planned(self) -> int:
        """Epochs of the whole run."""
        return sum(self.config[f"stage{stage}.epochs"] for stage in self.config["stages"])

    @property
    def state(self) -> str:
        return "finished" if self.results is not None else f"{len(self.rows)} of {self.planned} epochs"

    def rows_of(self, stage: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["stage"] == stage]


def find_runs(directories: Iterable[Path]) -> list[Path]:
    """The run directories named, and those within the other directories named, each once, in that order.

    Raises ReportError for a directory that is not there, or has no run in it.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"{directory} is no directory; name run directories, or one that holds them")
        inside = {path.parent for name in (CONFIG, METRICS) for path in directory.rglob(name)}
        if not inside:
            raise ReportError(f"{directory} holds no run: there is no {CONFIG} in it or below; name run directories")
        for path in [directory] if directory in inside else sorted(inside):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_run(directory: Path) -> Run:
    """Raises ReportError, which names the file, where one that every run has is missing or damaged."""
    config = _object(directory / CONFIG)
    _check(config, _SETTINGS, str(directory / CONFIG))
    stages = config["stages"]
    if not stages or not all(stage in (1, 2, 3) for stage in stages):
        raise ReportError(f"{directory / CONFIG}: stages is {stages!r}; {_WAY_OUT}")
    _check(config, {f"stage{stage}.epochs": int for stage in stages}, str(directory / CONFIG))
    results = _read_results(directory / RESULTS) if (directory / RESULTS).exists() else None
    rows = _read_rows(directory / METRICS, finished=results is not None)
    labelled, classes = _read_split(directory / SPLIT)
    run = Run(directory, config, rows, results, labelled or config["num_labels"], classes)
    if results is not None and [row["stage"] for row in rows] != [
        entry["stage"] for entry in results["stages"] for _ in range(entry["epochs"])
    ]:
        raise ReportError(f"{directory / METRICS} has {len(rows)} epochs, which are not those of {RESULTS}; {_WAY_OUT}")
    return run


def _read_results(path: Path) -> dict[str, Any]:
    results = _object(path)
    stages = results.get("stages")
    if not isinstance(stages, list) or not all(isinstance(entry, dict) for entry in stages):
        raise ReportError(f"{path} has no list of stages; {_WAY_OUT}")
    for number, entry in enumerate(stages, start=1):
        place = f"{path}, entry {number} of stages"
        _check(entry, _OF_A_STAGE, place)
        _check_numbers(entry, place)
    _check(results, {"test_error": _TEST_ERROR, "seconds": float}, str(path))
    return results


def _read_rows(path: Path, finished: bool) -> list[dict[str, Any]]:
    if not path.exists() and not finished:
        return []  # the first epoch is not over
    lines = _text(path).split("\n")
    # What follows the last line feed is nothing, or what a process was killed in the middle of.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        place = f"{path}, line {number}"
        row = _parsed(line, place)
        _check(row, _OF_AN_EPOCH, place)
        _check_numbers(row, place)
        rows.append(row)
    return rows


def _read_split(path: Path) -> tuple[int, frozenset[str]]:
    if not path.exists():
        return 0, frozenset()
    lines = [line for line in _text(path).split("\n") if line.strip()]
    return len(lines), frozenset(line.rpartition(" ")[2] for line in lines)


def _object(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}); {_WAY_OUT}") from error


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{place} is damaged: no JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{place} is damaged: no JSON object; {_WAY_OUT}")
    return value


def _check(values: dict[str, Any], kinds: Kinds, place: str) -> None:
    """That what is needed is there, and of its kind; a whole number is a float, too."""
    for name, kind in kinds.items():
        value = values.get(name)
        if kind == _TEST_ERROR and name in values and value is None:
            continue
        number = kind in (float, _TEST_ERROR)
        good = isinstance(value, int | float) and math.isfinite(value) if number else isinstance(value, kind)
        if not good:
            raise ReportError(f"{place}: {name} is {value!r}; {_WAY_OUT}")


def _check_numbers(values: dict[str, Any], place: str) -> None:
    """That there is nothing but numbers that can be drawn, and None."""
    _check(values, {name: float for name, value in values.items() if value is not None}, place)
