"""A trace of a few steps of each stage."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from r2d2fast.train.schedule import Epoch

# The first steps of a stage are not like the others: memory is allocated, kernels are chosen or compiled.
SKIPPED, TRACED = 3, 5


class StepTracer:
    """Writes Chrome traces, ``trace-stage1.json`` and so on, of the first steps of each stage that this process takes, a few
    left out; a stage with no more than those has none. What lies between the steps, predictions and evaluations, is in it, too.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stage = 0
        self.steps = 0
        self.place: tuple[Epoch, int] | None = None
        self.profiler: torch.profiler.profile | None = None

    def reached(self, epoch: Epoch, step: int) -> None:
        """So many steps of an epoch are done. May be called several times for one step, as in an evaluation after it."""
        if epoch.stage != self.stage:
            self.close()
            self.stage, self.steps = epoch.stage, 0
        if step == 0 or self.place == (epoch, step):
            return
        self.place = epoch, step
        self.steps += 1
        if self.steps == SKIPPED - 1:
            self.profiler = self._start()
        elif self.profiler is not None:
            self.profiler.step()
            if self.steps == SKIPPED + TRACED:
                self.close()

    def close(self) -> None:
        """Write what has been traced of a stage that is over."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _start(self) -> torch.profiler.profile:
        path = self.directory / f"trace-stage{self.stage}.json"
        profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
        profiler.start()
        return profiler
