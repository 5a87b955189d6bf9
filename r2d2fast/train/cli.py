"""The command line: ``python -m r2d2fast.train``."""

import gc
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import get_type_hints

import tyro

from r2d2fast.command import as_called
from r2d2fast.help_texts import description, docstring, field_texts
from r2d2fast.image_options import TEST_FRACTION
from r2d2fast.interruption import quietly_interrupted
from r2d2fast.train.config import SEEDS, Config, Integers
from r2d2fast.train.errors import ConfigError, LostRankError, TrainingError
from r2d2fast.train.recipes import CHOICES, RECIPES, flags, is_known, override, recipe_for
from r2d2fast.train.scaling import SCHEDULE, scaled

# PyTorch takes seconds to import. What needs it is imported when the command line has been read, so that --help is there at once.

PROGRAM = as_called("train")
HELP_ALL = "--help-all"
# What --help explains, and in this order; --help-all explains all flags.
FIRST_FLAGS = (
    *("dataset", "data_dir", "num_labels", "test_fraction", "run_dir", "dry_run", "resume", "seed", "runs", "stages"),
    *("schedule_scale", "method", "device", "backbone", "pretrained", "image_size", "on_bad_image"),
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), train, and return the :func:`exit_status`."""

    def act() -> None:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with quietly_interrupted(PROGRAM):
            from r2d2fast.train.command import carry_out
        carry_out(config)

    return exit_status(PROGRAM, act)


def exit_status(program: str, act: Callable[[], None]) -> int:
    """Call ``act``, say on standard error what stopped it, and return the exit status of ``program``.

    0: done; 1: the run could not go on; 2: the command line or the run directory does not fit; 130: interrupted;
    141: nobody reads what it prints; 143: stopped by SIGTERM, with a checkpoint.
    """
    try:
        act()
    except TrainingError as error:
        # The first process of each machine, for what may be wrong with one of several.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LostRankError):
            print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read has read enough; what Python would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell says it; Windows has no such signal
    except Exception as error:
        from r2d2fast.train.failures import in_words

        words = in_words(error)
        if words is None:
            raise
        print(f"{program}: {words}", file=sys.stderr)
        return TrainingError.status
    finally:
        # DistributedDataParallel, in a cycle of references, keeps the process group and its threads. One of them that frees its
        # last tensor while Python ends aborts the process, which torchrun takes for a failed run.
        if "LOCAL_RANK" in os.environ:
            gc.collect()
    return 0


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line, ``split`` resolved.

    Defaults are those of the data set's recipe; with --config those of the file; with --resume and --eval-only those of the run
    in the directory, if there is one.
    Raises ConfigError for an unknown data set or method, no runs, and seeds out of range; exits with status 2 for what is no flag
    or no value of one.
    """
    # What decides about other values first: the recipe gives the defaults of everything else.
    first, _ = tyro.cli(_First, args=arguments, prog=PROGRAM, return_unknown_args=True, add_help=False)
    goes_on = first.resume or first.eval_only
    if first.config is not None and goes_on:
        raise ConfigError(
            f"--config {first.config}: a run that goes on, or is evaluated, has settings of its own; leave out --config, or "
            "--resume and --eval-only for a new run with these settings"
        )
    if first.config is None and not is_known(first.dataset):
        raise ConfigError(
            f"--dataset {first.dataset}: unknown; accepted: {', '.join(RECIPES)}, torchvision:NAME, hf:NAME. "
            f"{PROGRAM} --help lists the flags"
        )
    defaults = first.recipe() if first.config is None else _settings_in(first.config)
    if not {"-h", "--help"}.isdisjoint(arguments):
        _print_help(defaults)
    # A flag that is only there where it changes the recipe may be that of a run whose recipe is not known yet.
    markers = () if goes_on or first.config else (tyro.conf.FlagCreatePairsOff,)
    words = ["--help" if word == HELP_ALL else word for word in arguments]
    read = partial(tyro.cli, Config, args=words, prog=PROGRAM, description=description(Config), config=markers)
    flags_given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    given = {name for name in (*SCHEDULE, "schedule_scale") if f"--{name.replace('_', '-')}" in flags_given}
    config = _checked(scaled(defaults, read(default=defaults), given))
    held = _held(config) if goes_on else None
    if held is None:
        return config
    asked = _checked(read(default=held))
    if "schedule_scale" in given:  # of the recipe, as in the command that began the run, and not of its scaled schedule
        asked = override(asked, {name: value for name, value in flags(config).items() if name in SCHEDULE})
    return asked


def _print_help(recipe: Config) -> None:
    """Explain FIRST_FLAGS, and exit."""
    types, texts = get_type_hints(Config, include_extras=True), field_texts(Config)
    of_first = [(name, types[name], field(default=getattr(recipe, name))) for name in FIRST_FLAGS]
    first = make_dataclass("First", of_first)
    first.__doc__ = docstring("", {name: texts[name] for name in FIRST_FLAGS})
    about = description(Config, f"These are the flags that are needed most; {HELP_ALL} explains all.")
    tyro.cli(first, args=["--help"], prog=PROGRAM, description=about, config=(tyro.conf.FlagCreatePairsOff,))


@dataclass(frozen=True)
class _First:
    """The flags on which the defaults of others depend."""

    dataset: str = "digits"
    data_dir: Path = Path("data")
    config: Path | None = None
    num_labels: int | None = None
    num_labels_per_class: Integers = ()
    split_file: Path | None = None
    optimizer: str | None = None
    method: str = "r2d2"
    backbone: str | None = None
    pretrained: Path | None = None
    download: bool = False
    test_fraction: float = TEST_FRACTION
    resume: bool = False
    eval_only: bool = False

    def recipe(self) -> Config:
        choices = {name: getattr(self, name) for name in CHOICES}
        if self.num_labels is None and self.split_file is not None and self.split_file.is_file():
            choices["num_labels"] = sum(bool(line.strip()) for line in self.split_file.read_bytes().splitlines())
        try:
            recipe = recipe_for(self.dataset, self.data_dir, **choices)
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from error
        return recipe.config


def _settings_in(path: Path) -> Config:
    from r2d2fast.train.run_directory import read_settings

    return read_settings(path)


def _held(config: Config) -> Config | None:
    """The configuration of the run that ``config`` goes on with, or of the first of several that is there."""
    from r2d2fast.train.run_directory import CONFIG, read_config

    for number in range(config.runs):
        directory = run_directory(of_run(config, number), number)
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


def of_run(config: Config, number: int) -> Config:
    """The configuration of one of --runs, from 0."""
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


def run_directory(config: Config, number: int) -> Path:
    """The directory of that run, whose own configuration is ``config``; of a repeated one it is new."""
    if config.run_dir is not None:
        return config.run_dir if config.runs == 1 else config.run_dir / f"run{number}"
    per_class = config.num_labels_per_class
    labels = f"{'-'.join(map(str, per_class))}-per-class" if per_class else str(config.num_labels)
    split = config.split_file.stem if config.split_file else f"labels{labels}-split{config.split}"
    method = "" if config.method == "r2d2" else f"-{config.method}"
    dataset = re.sub(r"[^\w.-]+", "-", config.dataset)
    usual = Path(f"runs/{dataset}{method}-{split}-seed{config.seed}")
    if config.config is None:
        return usual
    return next(path for path in chain([usual], (Path(f"{usual}-{again}") for again in count(2))) if not path.exists())
