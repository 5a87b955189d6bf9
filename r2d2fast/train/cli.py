"""The command line: ``python -m r2d2fast.train``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro
from rich.console import Console

from r2d2fast.data import DataError
from r2d2fast.data.photographs.workers import LoaderError
from r2d2fast.train.checks import SEEDS
from r2d2fast.train.config import Config
from r2d2fast.train.dry_run import print_plan
from r2d2fast.train.errors import ConfigError, LostRankError, TrainingError
from r2d2fast.train.ranks import Ranks, join_ranks
from r2d2fast.train.recipes import RECIPES, recipe_for
from r2d2fast.train.run import evaluate, run
from r2d2fast.train.run_directory import CONFIG, read_config
from r2d2fast.train.summary import print_errors, print_runs, print_summary

PROGRAM = "python -m r2d2fast.train"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), train, and return the :func:`exit_status`."""

    def act() -> None:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with prepared(config) as (ranks, console):
            _act(config, ranks, console)

    return exit_status(PROGRAM, act)


def exit_status(program: str, act: Callable[[], None]) -> int:
    """Call ``act``, say on standard error what stopped it, and return the exit status of ``program``.

    0: done; 1: the run could not go on; 2: the command line or the run directory does not fit; 130: interrupted;
    143: stopped by SIGTERM, with a checkpoint.
    """
    try:
        act()
    except TrainingError as error:
        # The first process of each machine, for what may be wrong with one of several.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LostRankError):
            print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except (DataError, LoaderError) as error:
        # Met by the rank whose image or loader it is.
        print(f"{program}: {error}", file=sys.stderr)
        return TrainingError.status
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


@contextmanager
def prepared(config: Config) -> Iterator[tuple[Ranks, Console]]:
    """The processes of a run and a console, which is quiet on all ranks but the first; PyTorch set as ``config`` says."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True  # images of one size, batches of few
    with join_ranks(config.device) as ranks:
        yield ranks, Console(quiet=not _is_first())


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _act(config: Config, ranks: Ranks, console: Console) -> None:
    if config.dry_run:
        print_plan(config, ranks, console)
        return
    finished = []
    for number in range(config.runs):
        one = _of_run(config, number)
        directory = _directory(one, number)
        if config.eval_only:
            print_errors(evaluate(one, directory, console, ranks), directory, console)
            continue
        results = run(one, directory, console, ranks)
        print_summary(results, directory, console)
        finished.append(results)
    if config.runs > 1 and not config.eval_only:
        print_runs(finished, console)


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line, ``split`` resolved.

    Defaults are those of the data set's recipe; with --resume and --eval-only those of the run in the directory, if there is one.
    Raises ConfigError for an unknown data set, no runs, and seeds out of range; exits with status 2 for what is no flag or no
    value of one.
    """
    # The data set first, because its recipe gives the defaults of everything else.
    (dataset, data_dir, optimizer, goes_on), _ = tyro.cli(
        _first, args=arguments, prog=PROGRAM, return_unknown_args=True, add_help=False
    )
    if dataset not in RECIPES:
        raise ConfigError(
            f"--dataset {dataset}: unknown; accepted: {', '.join(RECIPES)}. {PROGRAM} --help lists the flags"
        )
    # A flag that is only there where it changes the recipe may be that of a run whose recipe is not known yet.
    markers = () if goes_on else (tyro.conf.FlagCreatePairsOff,)
    read = partial(tyro.cli, Config, args=arguments, prog=PROGRAM, config=markers)
    config = _checked(read(default=recipe_for(dataset, data_dir, optimizer).config))
    held = _held(config) if goes_on else None
    return config if held is None else _checked(read(default=held))


def _first(
    dataset: str = "digits",
    data_dir: Path = Path("data"),
    optimizer: str = "sgd",
    resume: bool = False,
    eval_only: bool = False,
) -> tuple[str, Path, str, bool]:
    return dataset, data_dir, optimizer, resume or eval_only


def _held(config: Config) -> Config | None:
    """The configuration of the run that ``config`` goes on with, or of the first of several that is there."""
    for number in range(config.runs):
        directory = _directory(_of_run(config, number), number)
        held = read_config(directory)
        if held is not None:
            assert held.split is not None
            return replace(held, seed=held.seed - number, split=held.split - number)
    if config.run_dir is not None and config.runs == 1 and (config.run_dir / "run0" / CONFIG).exists():
        raise ConfigError(
            f"{config.run_dir} holds several runs: add --runs with their number, or name one of them, "
            f"--run-dir {config.run_dir / 'run0'}"
        )
    return None


def _of_run(config: Config, number: int) -> Config:
    assert config.split is not None
    return replace(config, seed=config.seed + number, split=config.split + number)


def _checked(config: Config) -> Config:
    """``config`` with ``split`` resolved."""
    if config.runs < 1:
        raise ConfigError(f"--runs {config.runs}: must be at least 1")
    split = config.seed if config.split is None else config.split
    # Before a split is drawn with a number that is none.
    for flag, number in (("--seed", config.seed), ("--split", split)):
        if not 0 <= number <= SEEDS - config.runs:
            raise ConfigError(f"{flag} {number}: must be 0 to {SEEDS - config.runs}")
    return replace(config, split=split)


def _directory(config: Config, number: int) -> Path:
    if config.run_dir is None:
        labels = config.split_file.stem if config.split_file else f"labels{config.num_labels}-split{config.split}"
        return Path(f"runs/{config.dataset}-{labels}-seed{config.seed}")
    return config.run_dir if config.runs == 1 else config.run_dir / f"run{number}"
