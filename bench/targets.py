"""The project's targets for the step (issue 2), and whether a measurement meets them."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.measure import Section

AT_LEAST = {
    (1024, 1000, "d2_step", "a"): 8.5,
    (1024, 1000, "d2_step", "c"): 4.0,
    (1024, 1000, "d2_step", "e"): 1.1,
    (512, 10, "d2_step", "a"): 12.0,
    (512, 10, "d2_step", "c"): 3.0,
    (512, 10, "module", "a"): 4.0,
    (512, 10, "module", "scalar"): 1 / 1.5,
}
"""Batch, classes, ours and opponent: how many times as long the opponent must take, on one thread."""

NO_LOWER_WITH_TWO_THREADS = (1024, 1000)


@dataclass(frozen=True)
class Verdict:
    """One of our steps against one opponent; ``target`` is None where no target was set."""

    batch: int
    classes: int
    threads: int
    ours: str
    opponent: str
    ratio: float
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target


def judge(sections: Iterable[Section]) -> list[Verdict]:
    """Every comparison; sections of one thread come before those of two, whose targets are the ratios of one."""
    verdicts: list[Verdict] = []
    for section in sections:
        shape = (section.batch, section.classes)
        single = {(v.ours, v.opponent): v.ratio for v in verdicts if (v.batch, v.classes, v.threads) == (*shape, 1)}
        own = [name for name in ("d2_step", "module") if name in section.seconds]
        for ours in own:
            # Autograd's own cost says something about the module alone: d2_step does without autograd.
            skipped = {*own, "scalar"} if ours == "d2_step" else set(own)
            for opponent in section.seconds.keys() - skipped:
                if section.threads == 1:
                    target = AT_LEAST.get((*shape, ours, opponent))
                else:
                    target = single.get((ours, opponent)) if shape == NO_LOWER_WITH_TWO_THREADS else None
                verdicts.append(Verdict(*shape, section.threads, ours, opponent, section.ratio(ours, opponent), target))
    return sorted(verdicts, key=lambda v: (-v.batch * v.classes, v.threads, v.ours, v.opponent))
