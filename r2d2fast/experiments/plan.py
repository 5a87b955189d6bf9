"""Which runs an experiment takes: every cell once a seed, its start before it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from r2d2fast.experiments.cells import R2D2, Cell, changed
from r2d2fast.train.config import Config
from r2d2fast.train.run_directory import NETWORK


@dataclass(frozen=True)
class Run:
    """A run of the trainer: its complete configuration, and its directory."""

    config: Config
    directory: Path


@dataclass(frozen=True)
class Place:
    """Where the runs of one seed are.

    Attributes:
        directory: of all runs with the data set.
        base: what the recipe and the command line give.
        seed, split: numbers, as of the trainer's flags.
    """

    directory: Path
    base: Config
    seed: int
    split: int

    def run(self, cell: Cell) -> Run:
        """The run of ``cell``. One that comes to the same as R2-D2 itself is the run of that name: the tables share it."""
        config = self._config(cell)
        directory = self._directory(R2D2 if config == self._config(R2D2) else cell)
        return Run(replace(config, run_dir=directory), directory)

    def runs(self, cells: Iterable[Cell]) -> list[Run]:
        """The runs of ``cells``, each once, in an order in which each comes after the one with whose network it starts."""
        needed = [one for cell in cells for one in (cell.start, cell) if one is not None]
        return list({run.directory: run for run in map(self.run, needed)}.values())

    def _config(self, cell: Cell) -> Config:
        config = replace(changed(self.base, cell.switches), seed=self.seed, split=self.split)
        return replace(config, pretrained=self._directory(cell.start) / NETWORK) if cell.start else config

    def _directory(self, cell: Cell) -> Path:
        return self.directory / f"seed{self.seed}-split{self.split}" / cell.name
