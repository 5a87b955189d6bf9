"""A table of the paper with our results beside the paper's: printed, as Markdown and as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from r2d2fast.experiments.paper import Table, Variant
from r2d2fast.tables import NO_VALUE, markdown_table, mean_std
from r2d2fast.train.files import write_atomically

METRICS = {"test_error": "top-1", "test_error_top5": "top-5"}


@dataclass(frozen=True)
class VariantResults:
    """A variant and the results of its runs, one for each seed: the contents of their ``results.json``."""

    variant: Variant
    results: Sequence[dict[str, Any]]

    def errors(self, metric: str, stage: int | None = None) -> list[float]:
        """Test errors in percent at the end of the runs, or of a stage; none where the runs have none."""
        entries = [
            result if stage is None else next((entry for entry in result["stages"] if entry["stage"] == stage), {})
            for result in self.results
        ]
        return [entry[metric] for entry in entries if entry.get(metric) is not None]

    def difference(self, metric: str) -> float | None:
        """How far the mean is above the paper's figure, in points; None where one of them is missing."""
        paper, values = getattr(self.variant.paper, metric), self.errors(metric)
        return None if paper is None or not values else statistics.mean(values) - paper

    def to_json(self, comparable: bool) -> dict[str, Any]:
        """The variant's entry of the JSON file."""
        errors: dict[str, Any] = {}
        for metric in METRICS:
            if values := self.errors(metric):
                errors[metric] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "paper": getattr(self.variant.paper, metric),
                    "difference": self.difference(metric) if comparable else None,
                    "runs": values,
                }
        return {
            "title": self.variant.title,
            "overrides": self.variant.overrides,
            **errors,
            "after_stage2": self.errors("test_error", 2),
            "seeds": [result["seed"] for result in self.results],
            "splits": [result["split"] for result in self.results],
            "seconds": sum(result["seconds"] for result in self.results),
        }


@dataclass(frozen=True)
class TableResults:
    """The results of all rows of a table.

    Attributes:
        name: ``table1`` …
        table: its definition.
        dataset: the data set that the runs used.
        labels: number of labelled samples of its R2-D2 runs.
        rows: the variants with their results, in the table's order.
    """

    name: str
    table: Table
    dataset: str
    labels: int
    rows: list[VariantResults]

    @property
    def title(self) -> str:
        """A caption that says what the figures are."""
        first = self.rows[0].results
        pairs = [(result["seed"], result["split"]) for result in first]
        same = all(seed == split for seed, split in pairs)
        seeds = ", ".join(str(seed) if same else f"{seed}/{split}" for seed, split in pairs)
        return (
            f"{self.name.replace('table', 'Table ')}: {self.table.title}. Test error in percent after the last epoch on "
            f"{self.dataset} with {self.labels} labels, {'seeds and splits' if same else 'seed/split'} {seeds}"
            + (": mean ± standard deviation" if len(first) > 1 else "")
        )

    @property
    def comparable(self) -> bool:
        """Whether the paper's figures are of this data set."""
        return self.dataset == self.table.dataset

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the printed table."""
        metrics = [metric for metric in METRICS if any(row.errors(metric) for row in self.rows)]
        after_stage2 = any(len(result["stages"]) > 1 for row in self.rows for result in row.results)
        header = ["", "after stage 2"] if after_stage2 else [""]
        lines = [
            [row.variant.title] + ([mean_std(row.errors("test_error", 2))] if after_stage2 else []) for row in self.rows
        ]
        for metric in metrics:
            name = f" {METRICS[metric]}" if len(metrics) > 1 else ""
            paper = "paper" if self.comparable else f"paper, on {self.table.dataset}"
            header += [f"ours{name}", paper + name] + ([f"difference{name}"] if self.comparable else [])
            for row, line in zip(self.rows, lines, strict=True):
                line += [mean_std(row.errors(metric)), _paper(row.variant, metric)]
                if self.comparable:
                    difference = row.difference(metric)
                    line.append(NO_VALUE if difference is None else f"{difference:+.2f}")
        return header, lines

    def print(self, console: Console) -> None:
        """Show the table."""
        header, lines = self.cells()
        printed = RichTable(title=self.title, title_justify="left")
        for heading in header:
            printed.add_column(heading, justify="right" if heading else "left")
        for line in lines:
            printed.add_row(*line)
        console.print(printed)

    def write(self, directory: Path) -> None:
        """Write ``NAME.md`` and ``NAME.json``. Raises TrainingError where that cannot be."""
        write_atomically(directory / f"{self.name}.md", f"{self.title}.\n\n{markdown_table(*self.cells())}\n".encode())
        content = {
            "table": self.name,
            "title": self.title,
            "dataset": self.dataset,
            "labels": self.labels,
            "paper_dataset": self.table.dataset,
            "rows": [row.to_json(self.comparable) for row in self.rows],
        }
        write_atomically(directory / f"{self.name}.json", (json.dumps(content, indent=2) + "\n").encode())


def _paper(variant: Variant, metric: str) -> str:
    value = getattr(variant.paper, metric)
    if value is None:
        return NO_VALUE
    return f"{value:.2f} ± {variant.paper.std:.2f}" if metric == "test_error" and variant.paper.std else f"{value:.2f}"
