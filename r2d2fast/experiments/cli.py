"""The command line: ``python -m r2d2fast.experiments``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from r2d2fast.command import as_called
from r2d2fast.experiments.compare import COMPARE, Comparison, configuration, run_of
from r2d2fast.experiments.estimate import print_estimate
from r2d2fast.experiments.figure2 import draw_figure2
from r2d2fast.experiments.paper import FIGURE2_DATASET, TABLES, Variant, figure2_variants
from r2d2fast.experiments.results import TableResults, VariantResults
from r2d2fast.experiments.runs import Repetition, Run
from r2d2fast.help_texts import with_help_texts
from r2d2fast.train import cli
from r2d2fast.train.command import prepared
from r2d2fast.train.config import Config, Integers
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.load_data import load_data
from r2d2fast.train.measure import duration
from r2d2fast.train.methods import METHODS
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.run import run
from r2d2fast.train.run_directory import RESULTS, check_same_run, open_directory

PROGRAM = as_called("experiments")
FIGURE2 = "figure2"
PAPER = (*TABLES, FIGURE2)
EXPERIMENTS = (*PAPER, COMPARE)
DEFAULT_SEEDS = (0, 1, 2)
# Flags of the trainer that an experiment sets itself, and what to use here instead.
NOT_HERE = {
    "--seed": "--seeds",
    "--split": "--splits",
    "--split-file": "--splits",
    "--runs": "--seeds",
    "--stages": "the experiments set it",
    "--method": "--methods, of compare",
    "--eval-only": "the tables are in the run directory",
}
DESCRIPTION = f"""The paper's tables and figures.

Variants of the same settings share their runs, and all runs of a seed share their stage 1.

Experiments, named before the flags: {
    "; ".join(f"{name}, {table.title} ({table.dataset})" for name, table in TABLES.items())
}; {FIGURE2}, features of a network with two of them ({FIGURE2_DATASET}); all of these.

{COMPARE}, --methods beside each other on a --dataset: the same splits, seeds, network and images seen.

The flags of {
    as_called("train")
} are accepted, too, and hold for every run: --data-dir, --download, --device, --workers ... \
In {COMPARE} the schedule, and the flags of R2-D2 alone, are R2-D2's; the others have as many images."""


@with_help_texts
@dataclass(frozen=True)
class Arguments:
    dataset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A data set of the trainer, digits for example. The default is the paper's own for each experiment."""

    seeds: Integers = ()
    """Seeds of the runs, comma separated: each variant is trained once with each. The default is --splits, or 0,1,2."""

    splits: Integers = ()
    """Draws of labelled samples, comma separated: one for each seed, or one for all. The default is --seeds."""

    methods: str = ",".join(METHODS)
    """The methods that compare trains, comma separated."""

    run_dir: Path = Path("runs/experiments")
    """Directory of all runs and tables."""

    resume: bool = False
    """Keep finished runs, and go on with those that have begun."""

    dry_run: bool = False
    """Print the runs and how long they would take, and train nothing."""


@dataclass(frozen=True)
class Options:
    """A command line, read and checked.

    Attributes:
        experiments: names, in the order in which they are run.
        repetitions: seed and split of each repetition.
        methods: of compare.
        configs: what the recipe and the command line make for each experiment; those of one data set are equal.
    """

    experiments: Sequence[str]
    repetitions: Sequence[tuple[int, int]]
    methods: Sequence[str]
    configs: dict[str, Config]
    run_dir: Path
    dry_run: bool


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), run the experiments, and return the trainer's ``exit_status``."""

    def act() -> None:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with prepared(next(iter(options.configs.values()))) as (ranks, console):
            (_estimate if options.dry_run else _run)(options, ranks, console)

    return cli.exit_status(PROGRAM, act)


def parse(arguments: list[str]) -> Options:
    """The options of a command line. Raises ConfigError for what cannot be; exits with status 2 for what is no flag."""
    # The names come first, because the values of the trainer's flags cannot be told from names here.
    first_flag = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names = arguments[:first_flag]
    own, trainer_flags = tyro.cli(
        Arguments,
        args=arguments[first_flag:],
        prog=f"{PROGRAM} EXPERIMENT [EXPERIMENT ...]",
        description=DESCRIPTION,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    for name in names or ["nothing"]:
        if name not in (*EXPERIMENTS, "all"):
            raise ConfigError(f"{name}: no experiment; accepted, before the flags: {', '.join(EXPERIMENTS)}, all")
    for flag in trainer_flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name in NOT_HERE:
            raise ConfigError(f"{name}: a flag of single runs; here: {NOT_HERE[name]}")
    experiments = [name for name in EXPERIMENTS if name in names or ("all" in names and name in PAPER)]
    methods = own.methods.split(",")
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"--methods {own.methods}: {method!r} is none; accepted: {', '.join(METHODS)}")
    if COMPARE in experiments and own.dataset is None:
        raise ConfigError(f"{COMPARE}: no data set is its own; name one by --dataset")
    configs = {}
    for name in experiments:
        dataset = own.dataset or (TABLES[name].dataset if name in TABLES else FIGURE2_DATASET)
        configs[name] = replace(cli.parse([*trainer_flags, "--dataset", dataset]), resume=own.resume)
    return Options(experiments, _repetitions(own.seeds, own.splits), methods, configs, own.run_dir, own.dry_run)


def _repetitions(seeds: tuple[int, ...], splits: tuple[int, ...]) -> list[tuple[int, int]]:
    seeds, splits = seeds or splits or DEFAULT_SEEDS, splits or seeds or DEFAULT_SEEDS
    longest = max(len(seeds), len(splits))
    for flag, numbers in (("--seeds", seeds), ("--splits", splits)):
        text = ",".join(map(str, numbers))
        if len(numbers) not in (1, longest):
            raise ConfigError(f"{flag} {text}: must be one number, or {longest}, as many as the other flag has")
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ConfigError(f"{flag} {text}: must be different numbers, from 0 on")
    return list(zip(seeds * (longest // len(seeds)), splits * (longest // len(splits)), strict=True))


def _repeated(options: Options, name: str) -> list[Repetition]:
    config = options.configs[name]
    return [Repetition(options.run_dir / config.dataset, config, *numbers) for numbers in options.repetitions]


def _runs(options: Options, name: str, ranks: Ranks) -> list[Run]:
    config, repetitions = options.configs[name], _repeated(options, name)
    if name == COMPARE:
        return _compared(config, options.methods, repetitions, ranks)
    if name == FIGURE2:
        return repetitions[0].runs(figure2_variants(config))
    return [one for repetition in repetitions for one in repetition.runs(TABLES[name].variants(config))]


def _compared(config: Config, methods: Sequence[str], repetitions: Sequence[Repetition], ranks: Ranks) -> list[Run]:
    """The runs of ``methods``, which see as many images as R2-D2 with ``config``."""
    _, labels = load_data(replace(config, split=repetitions[0].split), ranks)
    labelled = int((labels >= 0).sum())
    configs = [configuration(config, one, labelled, len(labels) - labelled, ranks.count) for one in methods]
    return [run_of(one, repetition) for one in configs for repetition in repetitions]


def _estimate(options: Options, ranks: Ranks, console: Console) -> None:
    seconds = 0.0
    for dataset, config in {config.dataset: config for config in options.configs.values()}.items():
        names = [name for name in options.experiments if options.configs[name].dataset == dataset]
        runs = {one.directory: one for name in names for one in _runs(options, name, ranks)}
        seconds += print_estimate(options.run_dir / dataset, config, list(runs.values()), ranks, console)
    console.print(f"about {duration(seconds)} for what is not finished", highlight=False)


def _run(options: Options, ranks: Ranks, console: Console) -> None:
    results: dict[Path, dict[str, Any]] = {}
    # The runs of all experiments before the first of them begins, so that what cannot be is said at once.
    all_runs = {name: _runs(options, name, ranks) for name in options.experiments}
    for name, runs in all_runs.items():
        for one in runs:
            if one.directory not in results:
                console.print(f"{name}: {one.directory}", highlight=False, soft_wrap=True)
                results[one.directory] = _results(one, ranks, console)
        repetitions, config = _repeated(options, name), options.configs[name]
        if name == FIGURE2:
            path = ranks.on_first(partial(draw_figure2, runs[0], runs[1], repetitions[0].directory, ranks))
            console.print(f"{path}, and its data in {path.with_suffix('.npz')}", highlight=False, soft_wrap=True)
            continue
        if name == COMPARE:
            every = [[results[one.directory] for one in runs if one.config.method == kind] for kind in options.methods]
            comparison = Comparison(config, dict(zip(options.methods, every, strict=True)))
            ranks.on_first(partial(comparison.write, repetitions[0].directory))
            comparison.print(console)
            continue
        rows = [
            VariantResults(variant, [results[repetition.run(variant).directory] for repetition in repetitions])
            for variant in TABLES[name].variants(config)
        ]
        if TABLES[name].opponents:
            rows += _opponents(config, repetitions, ranks, console)
        labels = min(result["num_labels"] for row in rows for result in row.results)  # one row may have all of them
        table = TableResults(name, TABLES[name], config.dataset, labels, rows)
        ranks.on_first(partial(table.write, repetitions[0].directory))
        table.print(console)


def _opponents(
    config: Config, repetitions: Sequence[Repetition], ranks: Ranks, console: Console
) -> list[VariantResults]:
    """A row for each method of others that compare has trained with all of the seeds, and with the settings of this table."""
    methods = [method for method in METHODS if method not in ("r2d2", "supervised")]
    there = ranks.on_first(lambda: [method for method in methods if _finished(config, method, repetitions)])
    runs = _compared(config, there, repetitions, ranks) if there else []
    rows = []
    for method in there:
        of_method = [one for one in runs if one.config.method == method]
        try:
            results = ranks.on_first(partial(_read_results, of_method))
        except ConfigError as error:
            console.print(f"{method}, by {COMPARE}, is left out: {error}", highlight=False, soft_wrap=True)
            continue
        rows.append(
            VariantResults(Variant(f"{COMPARE}-{method}", f"{method}, by {COMPARE}", {"method": method}), results)
        )
    return rows


def _finished(config: Config, method: str, repetitions: Sequence[Repetition]) -> bool:
    runs = [run_of(replace(config, method=method), repetition) for repetition in repetitions]
    return all((one.directory / RESULTS).exists() for one in runs)


def _read_results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Raises ConfigError where one was of other settings."""
    for one in runs:
        check_same_run(one.directory, one.config)
    return [json.loads((one.directory / RESULTS).read_text()) for one in runs]


def _results(one: Run, ranks: Ranks, console: Console) -> dict[str, Any]:
    # The trainer would find it out itself, but would load all data before.
    if ranks.on_first((one.directory / RESULTS).exists):
        finished = ranks.on_first(lambda: open_directory(one.directory, one.config))
        if finished is not None:
            return finished
    return run(one.config, one.directory, console, ranks)
