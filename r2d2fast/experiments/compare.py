"""The methods beside each other: the same splits, seeds, network and number of images seen, each with its own recipe."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from r2d2fast.experiments.runs import Repetition, Run
from r2d2fast.tables import NO_VALUE, markdown_table, mean_std
from r2d2fast.train.config import Config
from r2d2fast.train.files import write_atomically
from r2d2fast.train.method_recipes import OF_R2D2
from r2d2fast.train.recipes import flags, override, recipe_of
from r2d2fast.train.scaling import SCHEDULE
from r2d2fast.train.schedule import images_seen, make_schedule

COMPARE = "compare"


def configuration(base: Config, method: str, labelled: int, unlabelled: int, ranks: int) -> Config:
    """``base``, R2-D2's, for another method: the method's own recipe with what the command line changed in R2-D2's, but for the
    schedule and the flags of R2-D2 alone; for so many epochs that it sees as many images as R2-D2 does in all its stages."""
    if method == "r2d2":
        return base
    usual = flags(recipe_of(base).config)
    not_shared = (*OF_R2D2, *SCHEDULE)
    changed = {
        name: value for name, value in flags(base).items() if value != usual[name] and not name.startswith(not_shared)
    }
    config = override(recipe_of(replace(base, method=method)).config, changed)

    def seen(config: Config) -> int:
        return images_seen(config, make_schedule(config, labelled, unlabelled, ranks), labelled, unlabelled)

    stage = max(config.stages)
    name = f"stage{stage}"
    one_epoch = replace(config, stages=(stage,), **{name: replace(getattr(config, name), epochs=1)})
    epochs = max(round(seen(base) / seen(one_epoch)), 1)
    cosine = {"cosine_epochs": epochs} if stage == 1 else {}
    return replace(config, **{name: replace(getattr(config, name), epochs=epochs, **cosine)})


def run_of(config: Config, repetition: Repetition) -> Run:
    """The run of ``config.method`` with the seed and split of a repetition."""
    seed, split = repetition.seed, repetition.split
    place = repetition.directory / f"seed{seed}-split{split}" / f"{COMPARE}-{config.method}"
    return Run(replace(config, seed=seed, split=split, run_dir=place), place)


@dataclass(frozen=True)
class Comparison:
    """The results of all methods.

    Attributes:
        config: what the runs have in common.
        rows: for each method the contents of its runs' ``results.json``.
    """

    config: Config
    rows: dict[str, Sequence[dict[str, Any]]]

    @property
    def title(self) -> str:
        """A caption that says what the figures are."""
        runs = next(iter(self.rows.values()))
        pairs = ", ".join(f"{run['seed']}/{run['split']}" for run in runs)
        labels = f"{runs[0]['num_labels'] or 'all'} labels"
        return (
            f"Methods on {self.config.dataset} with {labels}, network {self.config.backbone}, seed/split {pairs}: test error in "
            "percent after the last epoch, mean ± standard deviation; images that the network was trained on, where each view of "
            "a sample is one; seconds of a run"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table."""
        lines = [
            [
                method,
                mean_std(_errors(runs)),
                f"{statistics.mean(run['images_seen'] for run in runs):.0f}",
                f"{statistics.mean(run['seconds'] for run in runs):.0f}",
                ", ".join(f"{error:.2f}" for error in _errors(runs)) or NO_VALUE,
            ]
            for method, runs in self.rows.items()
        ]
        return ["method", "test error", "images seen", "seconds", "each run"], lines

    def print(self, console: Console) -> None:
        """Show the table."""
        header, lines = self.cells()
        printed = RichTable(title=self.title, title_justify="left")
        for heading in header:
            printed.add_column(heading, justify="left" if heading == "method" else "right")
        for line in lines:
            printed.add_row(*line)
        console.print(printed)

    def write(self, directory: Path) -> None:
        """Write ``compare.md`` and ``compare.json``. Raises TrainingError where that cannot be."""
        write_atomically(directory / f"{COMPARE}.md", f"{self.title}.\n\n{markdown_table(*self.cells())}\n".encode())
        kept = ("seed", "split", "test_error", "images_seen", "seconds")
        rows = {method: [{name: run[name] for name in kept} for run in runs] for method, runs in self.rows.items()}
        content = {"title": self.title, "dataset": self.config.dataset, "rows": rows}
        write_atomically(directory / f"{COMPARE}.json", (json.dumps(content, indent=2) + "\n").encode())


def _errors(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["test_error"] for run in runs if run["test_error"] is not None]
