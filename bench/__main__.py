"""``python -m bench``: the D2 step against five baselines, in training and back to back, with the project's targets."""

import dataclasses
import json as json_format
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from bench import table
from bench.measure import Timing, measure, measure_in_training
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
    """The D2 step against five baselines, timed in turn, with the project's targets beside the ratios: between the passes of a
    network, as in training, and back to back.

    Args:
        quick: Measure one thread, two shapes and few rounds: under a minute.
        json: A file to which every time, ratio and verdict is written as well.
    """
    about = machine.describe()
    settings = QUICK if quick else FULL
    sections = {
        "in training": [
            measure_in_training(Workload(*shape, settings.rows), settings.rounds) for shape in settings.shapes
        ],
        "back to back": [
            measure(workload, threads, settings.rounds)
            for workload in (Workload(*shape, settings.rows) for shape in settings.shapes)
            for threads in settings.threads
        ],
    }
    memory = {name: step_memory(name) for name in ("d2_step", "in place", "module")}

    print(table.machine_list(about), end="\n\n")
    for name, timings in sections.items():
        print(
            f"## {name.capitalize()}", table.comparisons(compare(timings)), table.times(timings), sep="\n\n", end="\n\n"
        )
    grown = ", ".join(f"{name} {tensors:.2f}" for name, tensors in memory.items())
    print(f"Memory added by a step at {BATCH} x {CLASSES}, in tensors of that size (1 is the gradient): {grown}")
    if json:
        result = {
            "machine": about | {"load_average_at_the_end": machine.load_average()},
            **{name: _as_json(timings) for name, timings in sections.items()},
            "memory": memory,
        }
        json.write_text(json_format.dumps(result, indent=1))


def _as_json(timings: list[Timing]) -> dict[str, list[dict[str, Any]]]:
    return {
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "comparisons": [dataclasses.asdict(one) | {"met": one.met} for one in compare(timings)],
    }


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench", config=(tyro.conf.FlagCreatePairsOff,))
