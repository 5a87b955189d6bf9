"""The measurement as Markdown."""

from collections.abc import Iterable, Sequence

from bench.contestants import CONTESTANTS
from bench.measure import Section
from bench.targets import Verdict

BYTES_AN_ELEMENT = 16
"""A logit and a pseudo-logit read, a gradient and a pseudo-logit written, in float32."""


def times(sections: Sequence[Section]) -> str:
    rows = []
    for section in sections:
        elements = section.batch * section.classes
        for name in section.seconds:
            seconds = section.median(name)
            rates = (f"{seconds / elements * 1e9:.2f}", f"{BYTES_AN_ELEMENT * elements / seconds * 1e-9:.1f}")
            shown = ("", "") if name == "scalar" else rates
            step = f"{_label(name)}{CONTESTANTS[name].description}"
            rows.append(
                (f"{section.batch} x {section.classes}", str(section.threads), step, f"{seconds * 1e6:.0f}", *shown)
            )
    return markdown(("B x N", "threads", "step", "median µs", "ns/element", "GB/s"), rows)


def comparisons(verdicts: Iterable[Verdict]) -> str:
    words = {True: "met", False: "**not met**", None: ""}
    rows = [
        (
            f"{v.batch} x {v.classes}",
            str(v.threads),
            v.ours,
            f"{_label(v.opponent)}{CONTESTANTS[v.opponent].description}",
            f"{v.ratio:.2f}",
            "" if v.target is None else f"≥ {v.target:.2f}",
            words[v.met],
        )
        for v in verdicts
    ]
    return markdown(("B x N", "threads", "ours", "against", "times as fast", "target", ""), rows)


def _label(name: str) -> str:
    return f"({name}) " if len(name) == 1 else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])
