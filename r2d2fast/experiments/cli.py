"""The command line: ``python -m r2d2fast.experiments``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from r2d2fast.experiments.cells import FIGURE2_DATASET, TABLES, figure2_cells
from r2d2fast.experiments.estimate import print_estimate
from r2d2fast.experiments.figure2 import draw_figure2
from r2d2fast.experiments.plan import Place, Run
from r2d2fast.experiments.results import Filled, Measured
from r2d2fast.train import cli
from r2d2fast.train.config import Config
from r2d2fast.train.dry_run import duration
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.run import run
from r2d2fast.train.run_directory import RESULTS, open_directory

PROGRAM = "python -m r2d2fast.experiments"
FIGURE2 = "figure2"
EXPERIMENTS = (*TABLES, FIGURE2)
DEFAULT_NUMBERS = (0, 1, 2)
# Flags of the trainer that say what an experiment says itself.
OURS = {
    "--seed": "--seeds",
    "--split": "--splits",
    "--split-file": "--splits",
    "--runs": "--seeds",
    "--stages": "the experiments set it",
    "--eval-only": "the tables are in the run directory",
}


@dataclass(frozen=True)
class Options:
    """A command line.

    Attributes:
        experiments: by name.
        numbers: seed and split of each repetition.
        bases: of each experiment, what the recipe and the command line give; those of one data set are equal.
    """

    experiments: Sequence[str]
    numbers: Sequence[tuple[int, int]]
    bases: dict[str, Config]
    run_dir: Path
    dry_run: bool


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), run the experiments, and return the trainer's ``exit_status``."""

    def act() -> None:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with cli.prepared(next(iter(options.bases.values()))) as (ranks, console):
            (_estimate if options.dry_run else _run)(options, ranks, console)

    return cli.exit_status(PROGRAM, act)


def parse(arguments: list[str]) -> Options:
    """The options of a command line. Raises ConfigError for what cannot be; exits with status 2 for what is no flag."""
    own, rest = _parser().parse_known_args(arguments)
    # Names come before the trainer's flags, whose values cannot be told from names here.
    first_flag = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
    names, flags = rest[:first_flag], rest[first_flag:]
    for name in names or ["nothing"]:
        if name not in (*EXPERIMENTS, "all"):
            raise ConfigError(f"{name}: no experiment; accepted, before the flags: {', '.join(EXPERIMENTS)}, all")
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name in OURS:
            raise ConfigError(f"{name}: a flag of single runs; here: {OURS[name]}")
    experiments = [name for name in EXPERIMENTS if name in names or "all" in names]
    bases = {}
    for name in experiments:
        dataset = own.dataset or (FIGURE2_DATASET if name == FIGURE2 else TABLES[name].dataset)
        bases[name] = replace(cli.parse([*flags, "--dataset", dataset]), resume=own.resume)
    return Options(experiments, _numbers(own.seeds, own.splits), bases, own.run_dir, own.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} EXPERIMENT ... [--dataset NAME] [--seeds N,N,...] [--splits N,N,...] [--run-dir DIR] [--resume] "
        "[--dry-run] [flags of python -m r2d2fast.train]",
        description="The paper's tables and figures. Cells of the same settings share their runs, and all runs of a seed their "
        "stage 1.",
        epilog="experiments: "
        + "; ".join(f"{name}, {table.title} ({table.dataset})" for name, table in TABLES.items())
        + f"; {FIGURE2}, features of a network with two of them ({FIGURE2_DATASET}); all. "
        "Flags of the trainer hold for every run: --data-dir, --download, --device, --workers, --stage2.epochs ...",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", help="data set of the trainer, digits for example; default: the paper's own")
    parser.add_argument("--seeds", type=_integers, help="one run of each cell for each; default: --splits, or 0,1,2")
    parser.add_argument(
        "--splits", type=_integers, help="draws of labelled samples, one for each seed or one for all; default: --seeds"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep finished runs, go on with begun ones")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their estimated time; train nothing")
    return parser


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0 or 0,1,2") from error


def _numbers(seeds: tuple[int, ...] | None, splits: tuple[int, ...] | None) -> list[tuple[int, int]]:
    seeds, splits = seeds or splits or DEFAULT_NUMBERS, splits or seeds or DEFAULT_NUMBERS
    longest = max(len(seeds), len(splits))
    for flag, numbers in (("--seeds", seeds), ("--splits", splits)):
        text = ",".join(map(str, numbers))
        if len(numbers) not in (1, longest):
            raise ConfigError(f"{flag} {text}: must be one number, or {longest}, as many as the other flag has")
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ConfigError(f"{flag} {text}: must be different numbers, from 0 on")
    return list(zip(seeds * (longest // len(seeds)), splits * (longest // len(splits)), strict=True))


def _places(options: Options, name: str) -> list[Place]:
    base = options.bases[name]
    return [Place(options.run_dir / base.dataset, base, seed, split) for seed, split in options.numbers]


def _runs(options: Options, name: str) -> list[Run]:
    if name == FIGURE2:
        return _places(options, name)[0].runs(figure2_cells(options.bases[name]))
    return [one for place in _places(options, name) for one in place.runs(TABLES[name].cells(options.bases[name]))]


def _estimate(options: Options, ranks: Ranks, console: Console) -> None:
    seconds = 0.0
    for dataset, base in {base.dataset: base for base in options.bases.values()}.items():
        names = [name for name in options.experiments if options.bases[name].dataset == dataset]
        runs = {one.directory: one for name in names for one in _runs(options, name)}
        seconds += print_estimate(options.run_dir / dataset, base, list(runs.values()), ranks, console)
    console.print(f"about {duration(seconds)} for what is not finished", highlight=False)


def _run(options: Options, ranks: Ranks, console: Console) -> None:
    results: dict[Path, dict[str, Any]] = {}
    # All of them before the first, so that what cannot be is said at once.
    plans = {name: _runs(options, name) for name in options.experiments}
    for name, runs in plans.items():
        for one in runs:
            if one.directory not in results:
                console.print(f"{name}: {one.directory}", highlight=False, soft_wrap=True)
                results[one.directory] = _results(one, ranks, console)
        places, base = _places(options, name), options.bases[name]
        if name == FIGURE2:
            path = ranks.on_first(partial(draw_figure2, runs[0], runs[1], places[0].directory, ranks))
            console.print(f"{path}, and its data in {path.with_suffix('.npz')}", highlight=False, soft_wrap=True)
            continue
        cells = [
            Measured(cell, [results[place.run(cell).directory] for place in places])
            for cell in TABLES[name].cells(base)
        ]
        filled = Filled(name, TABLES[name], base.dataset, base.num_labels, cells)
        ranks.on_first(partial(filled.write, places[0].directory))
        filled.print(console)


def _results(one: Run, ranks: Ranks, console: Console) -> dict[str, Any]:
    # The trainer would find it out itself, but load all data before.
    if ranks.on_first((one.directory / RESULTS).exists):
        finished = ranks.on_first(lambda: open_directory(one.directory, one.config))
        if finished is not None:
            return finished
    return run(one.config, one.directory, console, ranks)
