"""Runs of one configuration, which differ in nothing but seed and split, and their statistics."""

import json
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from r2d2fast.report.runs import Run

# They say which of several equal runs it is.
OF_A_RUN = ("seed", "split", "split_file")
# Columns of the results: of each stage's entry in results.json, in the order of a table.
ERRORS = {
    "stage 1": (1, "test_error"),
    "stage 1, top-5": (1, "test_error_top5"),
    "D2 only": (2, "d2_test_error"),
    "stage 2": (2, "test_error"),
    "stage 2, top-5": (2, "test_error_top5"),
    "stage 3": (3, "test_error"),
    "stage 3, top-5": (3, "test_error_top5"),
}
PSEUDO_LABELS = "pseudo-labels"
SECONDS = "seconds"


class Statistic(NamedTuple):
    """Mean and sample standard deviation (n − 1), the latter None for a single value."""

    mean: float
    std: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Statistic":
        return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 2) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        letter: the name of the group in this report: A, B, …
        runs: in the order in which they were named.
        settings: what they have in common, by the name of the flag; of stages that are run only.
        apart: what sets them apart from the other groups, as text; "" where there is nothing.
    """

    letter: str
    runs: list[Run]
    settings: dict[str, Any]
    apart: str

    @property
    def title(self) -> str:
        return f"{self.letter}: {self.apart}" if self.apart else f"{self.letter}: {self.settings['dataset']}"

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.results is not None]

    @property
    def results(self) -> dict[str, Statistic]:
        """Of the finished runs: test errors and error of the pseudo-labels that stage 2 learned, in percent; seconds."""
        runs = [results_of(run) for run in self.finished]
        names = [name for name in (*ERRORS, PSEUDO_LABELS, SECONDS) if runs and all(name in run for run in runs)]
        return {name: Statistic.of([run[name] for run in runs]) for name in names}


def results_of(run: Run) -> dict[str, float]:
    """Columns of a finished run: those that it has."""
    assert run.results is not None
    stages = {entry["stage"]: entry for entry in run.results["stages"]}
    values = {name: stages.get(stage, {}).get(key) for name, (stage, key) in ERRORS.items()}
    if not (run.config.get("stage2.repredict_epochs") and run.config.get("stage2.repredict", True)):
        values["D2 only"] = None  # stage 2 is nothing else
    values[PSEUDO_LABELS] = next((row.get("pseudo_label_error") for row in reversed(run.rows_of(2))), None)
    values[SECONDS] = run.results["seconds"]
    return {name: value for name, value in values.items() if value is not None}


def make_groups(runs: list[Run]) -> list[Group]:
    """The groups, in the order of their first runs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(_key(run), []).append(run)
    settings = [_settings(members[0]) for members in grouped.values()]
    return [
        Group(letter, members, own, _apart(own, settings))
        for letter, members, own in zip(_letters(), grouped.values(), settings, strict=False)
    ]


def value_text(value: Any) -> str:
    """A setting as its flag takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _settings(run: Run) -> dict[str, Any]:
    left_out = tuple(f"stage{stage}." for stage in (1, 2, 3) if stage not in run.config["stages"])
    settings = {k: v for k, v in run.config.items() if k not in OF_A_RUN and not k.startswith(left_out or "\0")}
    settings["num_labels"] = run.labelled
    if 1 not in run.config["stages"]:
        # The network of another run's stage 1, each seed and split has its own.
        settings["pretrained"] = "stage 1 of another run"
    return settings


def _key(run: Run) -> str:
    # Image folders are told apart by their classes: where they are is not what they are, and no setting of the run.
    return json.dumps([_settings(run), sorted(run.classes)], sort_keys=True)


def _apart(own: dict[str, Any], everyone: list[dict[str, Any]]) -> str:
    """The settings that another group has not or otherwise. That it does not run a stage is said by ``stages`` alone."""

    def comparable(name: str, other: dict[str, Any]) -> bool:
        return not name.startswith("stage") or name == "stages" or int(name[5]) in other["stages"]

    differing = [
        name for name in own if any(other.get(name, ...) != own[name] for other in everyone if comparable(name, other))
    ]
    return "; ".join(f"{name} {value_text(own[name])}" for name in differing)


def _letters() -> Any:
    """A … Z, AA, AB, …"""
    for length in (1, 2, 3):
        yield from map("".join, product(string.ascii_uppercase, repeat=length))
