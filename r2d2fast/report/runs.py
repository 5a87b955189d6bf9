"""Reading run directories, whether the runs are finished, under way, stopped or damaged."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2d2fast.report.errors import ReportError
from r2d2fast.train.run_directory import CONFIG, METRICS, RESULTS, SPLIT

# Keys that a configuration, an epoch and a stage's result must have, with their types: without them nothing could be shown.
_SETTINGS = {"dataset": str, "seed": int, "split": int, "num_labels": int, "stages": list}
_OF_AN_EPOCH = {"stage": int, "epoch": int, "test_error": float}
_OF_A_STAGE = {"stage": int, "epochs": int, "test_error": float}
# None where the data set has no test samples.
_MAY_BE_NONE = ("test_error",)
_WAY_OUT = "restore it, or leave the run out"


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        directory: its path.
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
    """The run directories among those named, and those found within the others, each once and in that order.

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
    """The run in ``directory``. Raises ReportError, which names the file, where one that every run has is missing or damaged."""
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
    _check(results, {"test_error": float, "seconds": float}, str(path))
    return results


def _read_rows(path: Path, finished: bool) -> list[dict[str, Any]]:
    if not path.exists() and not finished:
        return []  # the first epoch is not over
    lines = _text(path).split("\n")
    # After the last line feed comes nothing, or half a line that a killed process was writing.
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


def _check(values: dict[str, Any], kinds: dict[str, type], place: str) -> None:
    """Raise ReportError unless every key is there with a value of its type; an integer counts as a float, too."""
    for name, kind in kinds.items():
        if name in _MAY_BE_NONE and values.get(name, ...) is None:
            continue
        value = values.get(name)
        good = isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)
        if not good:
            raise ReportError(f"{place}: {name} is {value!r}; {_WAY_OUT}")


def _check_numbers(values: dict[str, Any], place: str) -> None:
    """Raise ReportError unless all values are None or finite numbers, which can be drawn."""
    _check(values, {name: float for name, value in values.items() if value is not None}, place)
