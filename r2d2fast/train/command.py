"""What the command line asks for, carried out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console

from r2d2fast.train.cli import of_run, run_directory
from r2d2fast.train.config import Config
from r2d2fast.train.dry_run import print_plan
from r2d2fast.train.ranks import Ranks, join_ranks
from r2d2fast.train.run import evaluate, run
from r2d2fast.train.summary import print_errors, print_runs, print_summary


def carry_out(config: Config) -> None:
    """Train as ``config`` (with ``split`` resolved) says, or print the plan or the errors that it asks for."""
    with prepared(config) as (ranks, console):
        if config.dry_run:
            print_plan(config, ranks, console)
            return
        finished = []
        for number in range(config.runs):
            one = of_run(config, number)
            directory = ranks.on_first(lambda one=one, number=number: run_directory(one, number))  # type: ignore[misc]
            if config.eval_only:
                print_errors(evaluate(one, directory, console, ranks), directory, console)
                continue
            results = run(one, directory, console, ranks)
            print_summary(results, directory, console)
            finished.append(results)
        if config.runs > 1 and not config.eval_only:
            print_runs(finished, console)


@contextmanager
def prepared(config: Config) -> Iterator[tuple[Ranks, Console]]:
    """The processes of a run and a console, which is quiet on all ranks but the first; PyTorch set as ``config`` says while the
    context lasts."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True  # images of one size, batches of few
    try:
        with join_ranks(config.device) as ranks:
            yield ranks, Console(quiet=os.environ.get("RANK", "0") != "0")
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
