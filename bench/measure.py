"""Timing in turn: within one process each round times every step once, so that a busy machine slows all of them."""

import math
import statistics
import time
from dataclasses import dataclass

import torch

from bench.implementations import implementations
from bench.passes import Passes
from bench.workload import Step, Workload
from r2d2fast.train.threads import cpu_threads

SAMPLE_SECONDS = 2e-3
"""A timed sample is at least this long: far above the clock's resolution, short against the machine's moods."""


@dataclass(frozen=True)
class Timing:
    """Seconds a step, round by round, of every implementation at one shape and thread count."""

    batch: int
    classes: int
    threads: int
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, baseline: str) -> float:
        """How many times as long the baseline takes: the median over rounds of the ratio within a round."""
        pairs = zip(self.seconds[baseline], self.seconds[ours], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def prepare(workload: Workload) -> dict[str, Step]:
    """Every implementation's step, warmed up and compiled for this workload and the thread count PyTorch is set to."""
    # Inductor writes the thread count into its code; what it compiled for another must not be found again.
    torch._dynamo.reset()
    steps = {name: one.prepare(workload) for name, one in implementations(workload.logits.shape[1]).items()}
    for step in steps.values():
        for _ in range(3):
            step(next(workload.indices))
    return steps


def measure(workload: Workload, threads: int, rounds: int) -> Timing:
    """Calls back to back: all that a step touches twice, but the bank's rows, stays in the caches."""
    with cpu_threads(threads):
        steps = prepare(workload)
        calls = {name: math.ceil(SAMPLE_SECONDS / _sample(step, workload, 3)) for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].append(_sample(step, workload, calls[name]))
    batch, classes = workload.logits.shape
    return Timing(batch, classes, threads, seconds)


def measure_in_training(workload: Workload, rounds: int) -> Timing:
    """One call between the forward and the backward pass of a network, on one thread."""
    with cpu_threads(1):
        steps, passes = prepare(workload), Passes(workload)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].append(passes.sample(step))
    batch, classes = workload.logits.shape
    return Timing(batch, classes, 1, seconds)


def _sample(step: Step, workload: Workload, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step(next(workload.indices))
    return (time.perf_counter() - start) / calls
