"""``python -m bench``: the D2 step against five opponents, in turn, with the project's targets beside the ratios."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

from bench import machine, table
from bench.measure import Section, measure
from bench.memory import BATCH, CLASSES, step_memory
from bench.targets import judge
from bench.workload import Workload


class Plan(NamedTuple):
    shapes: tuple[tuple[int, int], ...]
    threads: tuple[int, ...]
    rounds: int
    rows: int = 100_000


FULL = Plan(shapes=((1024, 1000), (256, 1000), (512, 10)), threads=(1, 2), rounds=100)
QUICK = Plan(shapes=((1024, 1000), (512, 10)), threads=(1,), rounds=15)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one thread, two shapes, few rounds: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample, ratio and verdict there as well")
    options = parser.parse_args(arguments)
    about = machine.describe()
    sections = _run(QUICK if options.quick else FULL)
    verdicts = judge(sections)
    memory = {name: step_memory(name) for name in ("d2_step", "module")}
    about["load average at the end"] = " ".join(f"{load:.2f}" for load in os.getloadavg())

    print("\n".join(f"- {key}: {value}" for key, value in about.items()), end="\n\n")
    print(table.comparisons(verdicts), table.times(sections), sep="\n\n", end="\n\n")
    grown = ", ".join(f"{name} {tensors:.2f}" for name, tensors in memory.items())
    print(f"Memory added by a step at {BATCH} x {CLASSES}, in tensors of that size (1 is the gradient): {grown}")
    if options.json:
        result = {
            "machine": about,
            "sections": [dataclasses.asdict(section) for section in sections],
            "comparisons": [dataclasses.asdict(verdict) | {"met": verdict.met} for verdict in verdicts],
            "memory": memory,
        }
        options.json.write_text(json.dumps(result, indent=1))


def _run(plan: Plan) -> list[Section]:
    workloads = (Workload(*shape, plan.rows) for shape in plan.shapes)
    return [measure(workload, threads, plan.rounds) for workload in workloads for threads in plan.threads]


if __name__ == "__main__":
    main()
