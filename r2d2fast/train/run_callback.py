"""What a run in a directory does between the trainer's steps: it saves, shows, records, traces, and stops when it is told to."""

import signal
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from r2d2fast.train.callback import Callback
from r2d2fast.train.checkpoint import Checkpoints
from r2d2fast.train.config import Config
from r2d2fast.train.errors import PreemptedError
from r2d2fast.train.metrics import Metrics
from r2d2fast.train.profile import StepTracer
from r2d2fast.train.progress import Reporter
from r2d2fast.train.pseudo_labels import Moment, save_pseudo_labels
from r2d2fast.train.recipes import flags
from r2d2fast.train.schedule import Epoch
from r2d2fast.train.trackers import Tracker, start_tracker
from r2d2fast.train.trainer import Trainer

# Steps between two moments at which the ranks ask each other: a collective on the host, some 0.1 ms.
STEPS_BETWEEN_AGREEMENTS = 10


class RunCallback(Callback, AbstractContextManager["RunCallback"]):
    """A context manager: while it lasts it hears SIGTERM, and the progress bar lives.

    Args:
        trainer: at the position where the run begins or goes on.
        directory: of the run.
        console: where progress is shown.
    """

    def __init__(self, trainer: Trainer, directory: Path, console: Console) -> None:
        config, ranks = trainer.config, trainer.ranks
        done = trainer.position.epoch
        self.directory = directory
        self.checkpoints = Checkpoints(directory, done, config.checkpoint_minutes)
        self.terminated = Terminated()
        self.reporter = Reporter(console, trainer.schedule, done)
        self.tracker: Tracker | None = None
        ranks.on_first(lambda: self._start_tracker(config, done))
        self.metrics = Metrics(directory, trainer.history, self.tracker, writes=ranks.rank == 0)
        self.tracer = StepTracer(directory) if config.profile and ranks.rank == 0 else None
        self.calls = 0
        self.context = ExitStack()

    def __enter__(self) -> "RunCallback":
        self.context.enter_context(self.terminated)
        self.context.enter_context(self.reporter)
        if self.tracer is not None:
            self.context.enter_context(closing(self.tracer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.__exit__(kind, error, trace)
        if self.tracker is not None:
            self.tracker.close(failed=error is not None)

    def _start_tracker(self, config: Config, done: int) -> None:
        self.tracker = start_tracker(config.tracker, self.directory, flags(config), done)

    def between_steps(self, trainer: Trainer) -> None:
        """Save if a checkpoint is due; after a SIGTERM to any rank save and raise PreemptedError, on every rank."""
        if self.tracer is not None:
            self.tracer.reached(trainer.schedule[trainer.position.epoch], trainer.position.step)
        self.reporter.stepped(trainer.position.step)
        self.calls += 1
        if trainer.ranks.count > 1 and self.calls % STEPS_BETWEEN_AGREEMENTS:
            return
        if trainer.ranks.any(self.terminated.heard or self.checkpoints.due_within_an_epoch()):
            self.checkpoints.save(trainer)
            if trainer.ranks.any(self.terminated.heard):
                raise PreemptedError("SIGTERM: stopped, with a checkpoint; the same command with --resume goes on")

    def predicted(self, trainer: Trainer) -> None:
        """Record the classes predicted."""
        epoch = trainer.schedule[trainer.position.epoch]
        save_pseudo_labels(trainer, self.directory, Moment(epoch.stage, epoch.epoch, "predicted"))

    def epoch_ended(self, trainer: Trainer, epoch: Epoch, metrics: dict[str, Any]) -> None:
        """Write and show the metrics, record what stage 2 has learned, and save if it is time or the end of a stage."""
        self.metrics.append(metrics)
        self.reporter.epoch_ended(epoch, metrics)
        if epoch.stage == 2 and epoch.last:
            save_pseudo_labels(trainer, self.directory, Moment(epoch.stage, epoch.epoch + 1, "learned"))
        if trainer.ranks.any(epoch.last or self.checkpoints.due()):
            self.checkpoints.save(trainer)


class Terminated(AbstractContextManager[None]):
    """Whether SIGTERM has come, by which machines are taken away, since the context began; a second one ends the process at once.

    Attributes:
        heard: it has.
    """

    def __init__(self) -> None:
        self.heard = False

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._hear)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
