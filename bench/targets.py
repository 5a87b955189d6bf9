"""The project's own targets for the step, and whether a measurement meets them."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.measure import Timing

AT_LEAST = {
    (1024, 1000, "d2_step", "a"): 8.5,
    (1024, 1000, "d2_step", "c"): 3.5,
    (1024, 1000, "d2_step", "e"): 1.0,
    (512, 10, "d2_step", "a"): 10.0,
    (512, 10, "d2_step", "c"): 2.0,
    (512, 10, "module", "a"): 4.0,
    (512, 10, "module", "scalar"): 1 / 1.5,
}
"""Batch, classes, ours and baseline: how many times as long the baseline must take, on one thread."""

NO_LOWER_WITH_TWO_THREADS = (1024, 1000)


@dataclass(frozen=True)
class Comparison:
    """One of our steps against one baseline; ``target`` is None where no target was set."""

    batch: int
    classes: int
    threads: int
    ours: str
    baseline: str
    ratio: float
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target


def compare(timings: Iterable[Timing]) -> list[Comparison]:
    """Every comparison. Timings of one thread must come before those of two, whose targets are the ratios of one."""
    comparisons: list[Comparison] = []
    for timing in timings:
        shape = (timing.batch, timing.classes)
        single = {(v.ours, v.baseline): v.ratio for v in comparisons if (v.batch, v.classes, v.threads) == (*shape, 1)}
        own = [name for name in ("d2_step", "in place", "module") if name in timing.seconds]
        for ours in own:
            # Autograd's own cost says something about the module alone: d2_step does without autograd.
            skipped = set(own) if ours == "module" else {*own, "scalar"}
            for baseline in timing.seconds.keys() - skipped:
                if timing.threads == 1:
                    target = AT_LEAST.get((*shape, ours, baseline))
                else:
                    target = single.get((ours, baseline)) if shape == NO_LOWER_WITH_TWO_THREADS else None
                comparisons.append(
                    Comparison(*shape, timing.threads, ours, baseline, timing.ratio(ours, baseline), target)
                )
    return sorted(comparisons, key=lambda v: (-v.batch * v.classes, v.threads, v.ours, v.baseline))
