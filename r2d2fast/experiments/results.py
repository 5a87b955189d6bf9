"""A table of the paper filled in: beside the paper's figures ours, printed, as Markdown and as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from r2d2fast.experiments.cells import Cell, Table
from r2d2fast.train.files import write_atomically

NOTHING = "–"
KINDS = {"test_error": "top-1", "test_error_top5": "top-5"}


@dataclass(frozen=True)
class Measured:
    """A cell and the results of its runs, one a seed: contents of their ``results.json``."""

    cell: Cell
    results: Sequence[dict[str, Any]]

    def errors(self, kind: str, stage: int | None = None) -> list[float]:
        """Test errors in percent at the end of the runs, or of a stage; none where the runs have none."""
        parts = [
            result if stage is None else next((part for part in result["stages"] if part["stage"] == stage), {})
            for result in self.results
        ]
        return [part[kind] for part in parts if kind in part]


@dataclass(frozen=True)
class Filled:
    """A table with its results.

    Attributes:
        name: ``table1`` …
        table: its definition.
        dataset: on which the runs were.
        labels: labelled samples of its R2-D2 runs.
        cells: with their results, in the table's order.
    """

    name: str
    table: Table
    dataset: str
    labels: int
    cells: list[Measured]

    @property
    def title(self) -> str:
        """What the figures are."""
        first = self.cells[0].results
        pairs = [(result["seed"], result["split"]) for result in first]
        same = all(seed == split for seed, split in pairs)
        numbers = ", ".join(str(seed) if same else f"{seed}/{split}" for seed, split in pairs)
        labels = f"{self.labels} labels" if self.labels else "every label"
        return (
            f"{self.name.replace('table', 'Table ')}: {self.table.title}. Test error in percent after the last epoch on "
            f"{self.dataset} with {labels}, {'seeds and splits' if same else 'seed/split'} {numbers}"
            + (": mean ± standard deviation" if len(first) > 1 else "")
        )

    @property
    def comparable(self) -> bool:
        """Whether the paper's figures are of this data set."""
        return self.dataset == self.table.dataset

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows, as text."""
        kinds = [kind for kind in KINDS if any(one.errors(kind) for one in self.cells)]
        after2 = any(len(result["stages"]) > 1 for one in self.cells for result in one.results)
        headings = [""] + (["after stage 2"] if after2 else [])
        rows = [[one.cell.row] + ([_spread(one.errors("test_error", 2))] if after2 else []) for one in self.cells]
        for kind in kinds:
            of_kind = f" {KINDS[kind]}" if len(kinds) > 1 else ""
            paper = "paper" if self.comparable else f"paper, on {self.table.dataset}"
            headings += [f"ours{of_kind}", paper + of_kind] + ([f"difference{of_kind}"] if self.comparable else [])
            for one, row in zip(self.cells, rows, strict=True):
                row += [_spread(one.errors(kind)), _paper(one.cell, kind)]
                if self.comparable:
                    difference = _difference(one, kind)
                    row.append(NOTHING if difference is None else f"{difference:+.2f}")
        return headings, rows

    def print(self, console: Console) -> None:
        """Show the table."""
        headings, rows = self.columns()
        printed = RichTable(title=self.title, title_justify="left")
        for heading in headings:
            printed.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            printed.add_row(*row)
        console.print(printed)

    def write(self, directory: Path) -> None:
        """Write ``NAME.md`` and ``NAME.json``. Raises TrainingError where that cannot be."""
        headings, rows = self.columns()
        lines = ["| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows]]
        write_atomically(directory / f"{self.name}.md", "\n".join([self.title + ".", "", *lines, ""]).encode())
        content = {
            "table": self.name,
            "title": self.title,
            "dataset": self.dataset,
            "labels": self.labels,
            "paper_dataset": self.table.dataset,
            "cells": [_entry(one, self.comparable) for one in self.cells],
        }
        write_atomically(directory / f"{self.name}.json", (json.dumps(content, indent=2) + "\n").encode())


def _entry(measured: Measured, comparable: bool) -> dict[str, Any]:
    cell = measured.cell
    errors: dict[str, Any] = {}
    for kind in KINDS:
        values = measured.errors(kind)
        if values:
            errors[kind] = {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "paper": getattr(cell.paper, kind),
                "difference": _difference(measured, kind) if comparable else None,
                "runs": values,
            }
    return {
        "row": cell.row,
        "switches": cell.switches,
        **errors,
        "after_stage2": measured.errors("test_error", 2),
        "seeds": [result["seed"] for result in measured.results],
        "splits": [result["split"] for result in measured.results],
        "seconds": sum(result["seconds"] for result in measured.results),
    }


def _spread(values: list[float]) -> str:
    if not values:
        return NOTHING
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _paper(cell: Cell, kind: str) -> str:
    value = getattr(cell.paper, kind)
    if value is None:
        return NOTHING
    return f"{value:.2f} ± {cell.paper.std:.2f}" if kind == "test_error" and cell.paper.std else f"{value:.2f}"


def _difference(measured: Measured, kind: str) -> float | None:
    paper, values = getattr(measured.cell.paper, kind), measured.errors(kind)
    return None if paper is None or not values else statistics.mean(values) - paper
