"""``python -m bench``: the D2 step against five baselines, timed in turn, with the project's targets beside the ratios."""

import dataclasses
import json as json_format
from pathlib import Path
from typing import NamedTuple

import tyro

from bench import table
from bench.measure import Timing, measure
from bench.memory import BATCH, CLASSES, step_memory
from bench.targets import compare
from bench.workload import Workload
from r2d2fast import machine


class Settings(NamedTuple):
    shapes: tuple[tuple[int, int], ...]
    threads: tuple[int, ...]
    rounds: int
    rows: int = 100_000


FULL = Settings(shapes=((1024, 1000), (256, 1000), (512, 10)), threads=(1, 2), rounds=100)
QUICK = Settings(shapes=((1024, 1000), (512, 10)), threads=(1,), rounds=15)


def main(*, quick: bool = False, json: Path | None = None) -> None:
    """The D2 step against five baselines, timed in turn, with the project's targets beside the ratios.

    Args:
        quick: Measure one thread, two shapes and few rounds: under a minute.
        json: A file to which every time, ratio and verdict is written as well.
    """
    about = machine.describe()
    timings = _measure(QUICK if quick else FULL)
    comparisons = compare(timings)
    memory = {name: step_memory(name) for name in ("d2_step", "module")}

    print(table.machine_list(about), table.comparisons(comparisons), table.times(timings), sep="\n\n", end="\n\n")
    grown = ", ".join(f"{name} {tensors:.2f}" for name, tensors in memory.items())
    print(f"Memory added by a step at {BATCH} x {CLASSES}, in tensors of that size (1 is the gradient): {grown}")
    if json:
        result = {
            "machine": about | {"load_average_at_the_end": machine.load_average()},
            "timings": [dataclasses.asdict(timing) for timing in timings],
            "comparisons": [dataclasses.asdict(comparison) | {"met": comparison.met} for comparison in comparisons],
            "memory": memory,
        }
        json.write_text(json_format.dumps(result, indent=1))


def _measure(settings: Settings) -> list[Timing]:
    workloads = (Workload(*shape, settings.rows) for shape in settings.shapes)
    return [measure(workload, threads, settings.rounds) for workload in workloads for threads in settings.threads]


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench", config=(tyro.conf.FlagCreatePairsOff,))
