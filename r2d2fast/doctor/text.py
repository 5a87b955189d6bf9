"""The report as people read it; ``--json`` has everything."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from r2d2fast import BackendStatus
from r2d2fast.doctor.findings import Findings
from r2d2fast.doctor.speed import Speed
from r2d2fast.machine import as_text

_SHOWN = 5
"""How many failed checks of a backend are written out; the JSON has all of them."""


def print_environment(console: Console, about: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in as_text(about).items():
        table.add_row(name.replace("_", " "), escape(value))
    _section(console, "Installed", table)


def print_backends(console: Console, statuses: Mapping[str, BackendStatus]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, status in statuses.items():
        table.add_row(
            name, "[green]available[/]" if status.available else "[yellow]not available[/]", escape(status.detail)
        )
    _section(console, "Backends", table)


def print_checks(console: Console, findings: Findings) -> None:
    table = _table("backend", "check", "cases", "failed", "largest error*", left=2)
    for target in findings.targets:
        for number, (kind, group) in enumerate(groupby(findings.of(target), key=lambda check: check.kind)):
            found = list(group)
            errors = [check.error for check in found if check.error is not None]
            wrong = sum(check.problem is not None for check in found)
            table.add_row(
                "" if number else str(target),
                kind,
                str(len(found)),
                f"[red]{wrong}[/]" if wrong else "0",
                f"{max(errors):.2f}" if errors else "",
            )
        table.add_section()
    _section(console, "Against the definition in float64", table)
    console.print("* of the checks that passed, as a share of what rounding allows", style="dim")


def print_speeds(console: Console, speeds: Sequence[Speed]) -> None:
    table = _table(
        "backend", "B x N, dtype", "step, µs", "GB/s", "of copy's speed", "on the GPU, µs", "kernels", left=2
    )
    for speed in speeds:
        table.add_row(
            f"{speed.backend} on {speed.device}",
            f"{speed.batch} x {speed.classes}, {speed.dtype}",
            f"{speed.seconds * 1e6:.1f}",
            f"{speed.gb_per_second:.1f}",
            f"{speed.copy_fraction:.0%}",
            "" if speed.kernel_seconds is None else f"{speed.kernel_seconds * 1e6:.1f}",
            _kernels(speed),
        )
    _section(console, "Speed", table)
    console.print(
        "Medians of one step as a Python loop calls it; GB/s: logits and rows read, gradient and rows written, once each; "
        "copy: as many bytes by Tensor.copy_, measured in turn with the step. Rows are random ones of a bank beyond any cache.",
        style="dim",
    )
    for note in dict.fromkeys(
        f"kernels of {speed.backend} on {speed.device}: {speed.kernels_note}" for speed in speeds
    ):
        console.print(escape(note), style="dim")


def print_verdict(console: Console, findings: Findings) -> None:
    """What failed, and at the very end the answer for every backend."""
    console.print()
    verdicts = []
    for target in findings.targets:
        failed = [check for check in findings.of(target) if check.problem is not None]
        for check in failed[:_SHOWN]:
            console.print(f"[red]failed[/] {escape(str(check))}")
        if failed[_SHOWN:]:
            console.print(f"… and {len(failed) - _SHOWN} more of {target}; --json FILE keeps all")
        verdicts.append(f"[red]wrong[/]  {target}" if failed else f"[green]right[/]  {target}")
    console.print("\n".join(verdicts))


def _kernels(speed: Speed) -> str:
    if speed.kernels is None:
        return "?"
    as_expected = speed.kernels == 1 or speed.backend == "reference"
    return f"{speed.kernels:g}" if as_expected else f"[red]{speed.kernels:g}, expected 1[/]"


def _table(*headings: str, left: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right")
    return table


def _section(console: Console, heading: str, content: Table) -> None:
    console.print(f"\n[bold]{heading}[/]")
    console.print(content)
