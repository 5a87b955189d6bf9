"""The command line: ``python -m r2d2fast.train``."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from r2d2fast.data import load_dataset
from r2d2fast.train.config import Config
from r2d2fast.train.dry_run import print_plan
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.run import run
from r2d2fast.train.trainer import Trainer

PROGRAM = "python -m r2d2fast.train"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), train, and return the exit status.

    0: done; 1: the run could not go on; 2: the command line or the run directory does not fit; 130: interrupted.
    """
    console = Console()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        directory = config.run_dir or Path(
            f"runs/{config.dataset}-labels{config.num_labels}-split{config.split}-seed{config.seed}"
        )
        if config.dry_run:
            print_plan(Trainer(config, load_dataset(config.dataset)), console)
            return 0
        results = run(config, directory, console)
    except TrainingError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    print_summary(results, directory, console)
    return 0


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line, ``split`` and ``device`` resolved.

    Raises ConfigError for an unknown data set or device; exits with status 2 for what is no flag or no value of one.
    """
    # The data set first, because its recipe gives the defaults of everything else.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="digits")
    dataset = first.parse_known_args(arguments)[0].dataset
    if dataset not in RECIPES:
        raise ConfigError(
            f"--dataset {dataset}: unknown; accepted: {', '.join(RECIPES)}. {PROGRAM} --help lists the flags"
        )
    config = tyro.cli(
        Config, args=arguments, default=RECIPES[dataset], prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,)
    )
    split = config.seed if config.split is None else config.split
    return replace(config, split=split, device=_device(config.device))


def print_summary(results: dict[str, Any], directory: Path, console: Console) -> None:
    """Print the errors after each stage, the time, and where the files are."""
    for entry in results["stages"]:
        d2 = f" (before R2 {entry['d2_test_error']:.2f} %)" if "d2_test_error" in entry else ""
        console.print(
            f"stage {entry['stage']}: test error {entry['test_error']:.2f} % after {entry['epochs']} epochs{d2}",
            highlight=False,
        )
    console.print(
        f"{results['seconds']:.0f} s; results, metrics, pictures and checkpoints are in {directory}",
        highlight=False,
        soft_wrap=True,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {reason}; accepted: auto, cpu, and cuda where there is a GPU") from error
    return name
