"""How much of the time the network takes: its forward and backward passes and its optimizer."""

import time

import torch

# Of a GPU's steps one in so many is timed: an event is cheap, but not free.
EVERY = 16


class Stopwatch:
    """Adds up the time inside its contexts, several of each to a step, from when it is made.

    On a GPU by events, which nothing waits for until :meth:`share_outside` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def next_step(self) -> None:
        """A step begins."""
        self._steps += 1

    def __enter__(self) -> None:
        if not self._cuda:
            self._began = time.perf_counter()
        elif self._steps % EVERY == 0:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)

    def __exit__(self, *error: object) -> None:
        if not self._cuda:
            self._seconds += time.perf_counter() - self._began
        elif self._steps % EVERY == 0:
            self._events[-1][1].record()

    def share_outside(self, seconds: float) -> float | None:
        """The part of ``seconds`` that was not spent inside, 0 … 1; None where no step was timed. Waits for the device."""
        timed = self._steps
        if self._cuda:
            torch.cuda.synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            timed //= EVERY
        return max(1 - self._seconds * self._steps / timed / seconds, 0.0) if timed else None
