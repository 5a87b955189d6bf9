"""Runs of one configuration, which differ in nothing but seed and split, and their statistics."""

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from r2d2fast.report.runs import Run
from r2d2fast.report.same_data import Data, data_of
from r2d2fast.train.run_directory import NOT_COMPARED

# In these settings runs of one configuration may differ.
REPETITION = NOT_COMPARED | {"seed", "split", "split_file"}
# Columns of a table of results, in order, and where they stand in results.json: the stage's entry, and the key in it.
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
WHOLE_NUMBERS = ("images seen", "seconds")
COLUMNS = (*ERRORS, PSEUDO_LABELS, *WHOLE_NUMBERS)
"""Test errors, and the error of the pseudo-labels that stage 2 learned, in percent; images that the whole run was trained on, and
its seconds."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        letter: the name of the group in this report: A, B, …
        runs: in the order in which they were named.
        settings: what they have in common, by the name of the flag; of stages that are run only.
        difference: the settings in which they differ from other groups, as text; "" where there are none.
    """

    letter: str
    runs: list[Run]
    settings: dict[str, Any]
    difference: str

    @property
    def title(self) -> str:
        return f"{self.letter}: {self.difference}" if self.difference else f"{self.letter}: {self.settings['dataset']}"

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.results is not None]

    @property
    def counted(self) -> list[Run]:
        """The finished runs, of those with one seed and split the first, as the others say nothing new."""
        first: dict[tuple[Any, Any], Run] = {}
        for run in self.finished:
            first.setdefault((run.config["seed"], run.config["split_file"] or run.config["split"]), run)
        return list(first.values())

    @property
    def results(self) -> dict[str, list[float]]:
        """A column of figures for each name in COLUMNS that all runs that count have, a figure for each of them."""
        runs = [results_of(run) for run in self.counted]
        names = [name for name in COLUMNS if runs and all(name in run for run in runs)]
        return {name: [run[name] for run in runs] for name in names}


def results_of(run: Run) -> dict[str, float]:
    """The figures of a finished run: those of COLUMNS that it has."""
    assert run.results is not None
    stages = {entry["stage"]: entry for entry in run.results["stages"]}
    values = {name: stages.get(stage, {}).get(key) for name, (stage, key) in ERRORS.items()}
    if not (run.config.get("stage2.repredict_epochs") and run.config.get("stage2.repredict", True)):
        values["D2 only"] = None  # the whole of stage 2 is D2
    values[PSEUDO_LABELS] = next((row.get("pseudo_label_error") for row in reversed(run.rows_of(2))), None)
    values |= {name: run.results.get(name.replace(" ", "_")) for name in WHOLE_NUMBERS}
    return {name: value for name, value in values.items() if value is not None}


def make_groups(runs: list[Run]) -> list[Group]:
    """The groups, in the order of their first runs."""
    grouped: dict[str, list[Run]] = {}
    settings_of: dict[str, dict[str, Any]] = {}
    for run, data in zip(runs, data_of(runs), strict=True):
        settings = _settings(run, data)
        # The classes tell data apart also of runs that are not finished, and parts of ImageNet.
        key = json.dumps([settings, data and data.recorded, sorted(run.classes)], sort_keys=True)
        grouped.setdefault(key, []).append(run)
        settings_of.setdefault(key, settings)
    everyone = list(settings_of.values())
    return [
        Group(letter, members, own, _difference(own, everyone))
        for letter, members, own in zip(_letters(), grouped.values(), everyone, strict=False)
    ]


def value_text(value: Any) -> str:
    """The value of a setting, as its flag takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _settings(run: Run, data: Data | None) -> dict[str, Any]:
    left_out = [f"stage{stage}." for stage in (1, 2, 3) if stage not in run.config["stages"]]
    if run.config.get("method", "r2d2") in ("r2d2", "supervised"):
        left_out.append("unlabelled.")
    settings = {k: v for k, v in run.config.items() if k not in REPETITION and not k.startswith(tuple(left_out))}
    settings["num_labels"] = run.labelled
    if data is not None:
        settings["data_dir"] = data.directory
    if 1 not in run.config["stages"] and run.config.get("pretrained"):
        # It starts with the network of another run's stage 1, which differs from seed to seed.
        settings["pretrained"] = "stage 1 of another run"
    return settings


def _difference(own: dict[str, Any], everyone: list[dict[str, Any]]) -> str:
    """The settings of which another group has another value, or none. A stage that it does not run shows in ``stages`` alone, and
    another method in ``method``, with whose recipe much is another."""

    def comparable(name: str, other: dict[str, Any]) -> bool:
        if name != "method" and other.get("method", "r2d2") != own.get("method", "r2d2"):
            return False
        return not name.startswith("stage") or name == "stages" or int(name[5]) in other["stages"]

    differing = [
        name for name in own if any(other.get(name, ...) != own[name] for other in everyone if comparable(name, other))
    ]
    return "; ".join(f"{name} {value_text(own[name])}" for name in differing)


def _letters() -> Iterator[str]:
    """A … Z, AA, AB, …"""
    for length in (1, 2, 3):
        yield from map("".join, product(string.ascii_uppercase, repeat=length))
