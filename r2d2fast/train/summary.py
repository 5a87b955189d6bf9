"""What a run says when it is over."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r2d2fast.command import as_called
from r2d2fast.tables import NO_VALUE, counted, mean_std, say
from r2d2fast.train.labels import LABELS
from r2d2fast.train.run_directory import NETWORK

# Bad images that are named; all are counted.
NAMED = 10
NO_TEST_ERROR = "no test error, as there are no test samples"


def print_errors(errors: dict[str, float | None], directory: Path, console: Console) -> None:
    """Print the test errors of a network that was only evaluated."""
    say(console, f"{_errors(errors)}: the network in {directory}")


def print_summary(results: dict[str, Any], directory: Path, console: Console) -> None:
    """Print the errors after each stage, the times, and where the files are."""
    for entry in results["stages"]:
        d2 = entry.get("d2_test_error")
        before_r2 = "" if d2 is None else f" (before R2 {d2:.2f} %)"
        rate, outside = entry["images_per_second"], entry["outside_network"]
        speed = "" if rate is None else f", {rate:.0f} images/s"
        share = "" if outside is None else f", {100 * outside:.0f} % of the time outside the network"
        say(
            console,
            f"stage {entry['stage']}: {_errors(entry)} after {counted(entry['epochs'], 'epoch')}{before_r2}; "
            f"{entry['seconds']:.0f} s{speed}{share}",
        )
    if results["bad_images"]:
        say(console, f"{counted(results['bad_images'], 'image')} could not be read:")
        for name, reason in results.get("bad_images_named", {}).items():
            say(console, f"  {name}: {reason}")
        if results["bad_images"] > NAMED:
            say(console, f"  and {results['bad_images'] - NAMED} more; {LABELS} names all that are not labelled")
    say(
        console,
        f"{results['seconds']:.0f} s; in {directory} are {LABELS}, the class of every training sample, {NETWORK}, results, "
        "metrics, pictures and checkpoints.",
    )
    # In one piece, to be copied.
    console.print(
        f"To label others: {as_called('predict')} {shlex.quote(str(directory))} SOURCE", highlight=False, soft_wrap=True
    )


def print_runs(results: list[dict[str, Any]], console: Console) -> None:
    """Print the errors of several runs, their mean and their standard deviation, in percent."""
    stages = [entry["stage"] for entry in results[0]["stages"]]
    table = Table(title="test error in percent at the end of each stage")
    table.add_column("seed", justify="right")
    table.add_column("split", justify="right")
    for stage in stages:
        table.add_column(f"stage {stage}", justify="right")
    columns = [[run["stages"][place]["test_error"] for run in results] for place in range(len(stages))]
    if None in columns[0]:
        return  # without test data there is nothing to compare
    for place, run in enumerate(results):
        table.add_row(str(run["seed"]), str(run["split"]), *(_percent(column[place]) for column in columns))
    table.add_section()
    table.add_row("mean ± std", "", *(mean_std([error for error in column if error is not None]) for column in columns))
    console.print(table)


def _percent(error: float | None) -> str:
    return NO_VALUE if error is None else f"{error:.2f}"


def _errors(entry: dict[str, Any]) -> str:
    if entry["test_error"] is None:
        return NO_TEST_ERROR
    top5 = f", top-5 {entry['test_error_top5']:.2f} %" if "test_error_top5" in entry else ""
    return f"test error {entry['test_error']:.2f} %{top5}"
