"""Measurements as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.implementations import IMPLEMENTATIONS
from bench.measure import Timing
from bench.targets import Comparison
from r2d2fast.machine import as_text, load_average
from r2d2fast.tables import markdown_table

BYTES_AN_ELEMENT = 16
"""A logit and a pseudo-logit read, a gradient and a pseudo-logit written, in float32."""


def machine_list(description: Mapping[str, Any]) -> str:
    """The machine of a measurement that is now over: no figure means anything without it."""
    lines = as_text(description) | {"load average at the end": load_average()}
    return "\n".join(f"- {name.replace('_', ' ')}: {text}" for name, text in lines.items())


def times(timings: Sequence[Timing]) -> str:
    rows = []
    for timing in timings:
        elements = timing.batch * timing.classes
        for name in timing.seconds:
            seconds = timing.median(name)
            rates = (f"{seconds / elements * 1e9:.2f}", f"{BYTES_AN_ELEMENT * elements / seconds * 1e-9:.1f}")
            shown = ("", "") if name == "scalar" else rates
            step = f"{_label(name)}{IMPLEMENTATIONS[name].description}"
            rows.append(
                (f"{timing.batch} x {timing.classes}", str(timing.threads), step, f"{seconds * 1e6:.0f}", *shown)
            )
    return markdown_table(("B x N", "threads", "step", "median µs", "ns/element", "GB/s"), rows)


def comparisons(found: Iterable[Comparison]) -> str:
    rows = [
        (
            f"{one.batch} x {one.classes}",
            str(one.threads),
            one.ours,
            f"{_label(one.baseline)}{IMPLEMENTATIONS[one.baseline].description}",
            f"{one.ratio:.2f}",
            "" if one.target is None else f"≥ {one.target:.2f}",
            verdict(one.met),
        )
        for one in found
    ]
    return markdown_table(("B x N", "threads", "ours", "against", "times as fast", "target", ""), rows)


def verdict(met: bool | None) -> str:
    """In words, whether a target is met; None where there is none."""
    return {True: "met", False: "**not met**", None: ""}[met]


def _label(name: str) -> str:
    return f"({name}) " if len(name) == 1 else ""
