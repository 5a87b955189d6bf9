"""Which runs a table takes: every variant once for each seed, after the variant that it starts from."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from r2d2fast.experiments.paper import R2D2, Variant
from r2d2fast.train.config import Config
from r2d2fast.train.recipes import override
from r2d2fast.train.run_directory import NETWORK


@dataclass(frozen=True)
class Run:
    """A run of the trainer: its complete configuration, and its directory."""

    config: Config
    directory: Path


@dataclass(frozen=True)
class Repetition:
    """The runs of one seed and split.

    Attributes:
        directory: the directory of all runs with the data set.
        base: the configuration that the recipe and the command line make.
        seed, split: as the trainer's flags.
    """

    directory: Path
    base: Config
    seed: int
    split: int

    def run(self, variant: Variant) -> Run:
        """The run of ``variant``. With the settings of R2-D2 itself it is the run of that name, which the tables share."""
        config = self._config(variant)
        directory = self._directory(R2D2 if config == self._config(R2D2) else variant)
        return Run(replace(config, run_dir=directory), directory)

    def runs(self, variants: Iterable[Variant]) -> list[Run]:
        """The runs of ``variants``, each once, in an order in which each comes after the one with whose network it starts."""
        needed = [one for variant in variants for one in (variant.start, variant) if one is not None]
        return list({run.directory: run for run in map(self.run, needed)}.values())

    def _config(self, variant: Variant) -> Config:
        config = replace(override(self.base, variant.overrides), seed=self.seed, split=self.split)
        return replace(config, pretrained=self._directory(variant.start) / NETWORK) if variant.start else config

    def _directory(self, variant: Variant) -> Path:
        return self.directory / f"seed{self.seed}-split{self.split}" / variant.name
