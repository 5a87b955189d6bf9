"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from r2d2fast.tables import say
from r2d2fast.train.schedule import Epoch

# Plain lines go to log files: often enough to see that the run lives, not one for each of 600 short epochs.
SECONDS_BETWEEN_LINES = 10
SECONDS_BETWEEN_FRAMES = 0.1
# Columns of a terminal from which the loss and the speed leave room for a bar.
WIDE = 110


class Reporter:
    """Shows epochs as they end. A context manager: the bar lives inside.

    Args:
        console: where to.
        schedule: all epochs of the run.
        done: how many of them were done before, by the run that is resumed.
    """

    def __init__(self, console: Console, schedule: list[Epoch], done: int) -> None:
        self.console = console
        self.epochs_of_stage = {epoch.stage: epoch.epoch + 1 for epoch in schedule}
        self.line_due = time.monotonic() + SECONDS_BETWEEN_LINES
        self.bar_due = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        # In steps, because an epoch of stage 1 can be a hundred times shorter than one of stage 2.
        self.before = sum(epoch.steps for epoch in schedule[:done])  # this epoch
        begins = self._place(schedule[done]) if done < len(schedule) else ""
        self.task = self.bar.add_task(begins, total=sum(epoch.steps for epoch in schedule), completed=self.before)

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def stepped(self, step: int) -> None:
        """Show that so many steps of an epoch are done, as often as a terminal is drawn anew."""
        now = time.monotonic()
        if not self.bar.disable and now >= self.bar_due:  # an update takes 30 µs, of steps of 2 ms
            self.bar.update(self.task, completed=self.before + step)
            self.bar_due = now + SECONDS_BETWEEN_FRAMES

    def epoch_ended(self, epoch: Epoch, row: dict[str, Any]) -> None:
        """Show the metrics of an epoch: always in the bar; as a line at stage ends, repredictions and now and then."""
        error, label_error, rate = row["test_error"], row["pseudo_label_error"], row["images_per_second"]
        place = self._place(epoch)
        loss = f"  loss {row['train_loss']:.4f}"
        errors = "" if error is None else f"  error {error:.2f} %"
        speed = "" if rate is None else f"  {rate:.0f} images/s"
        self.before += epoch.steps
        text = place + errors if self.console.width < WIDE else place + loss + errors + speed
        self.bar.update(self.task, description=text, completed=self.before)
        now = time.monotonic()
        if epoch.last or (not self.console.is_terminal and (epoch.repredicts or now >= self.line_due)):
            notes = "" if label_error is None else f"  pseudo-label error {label_error:.2f} %"
            notes += f"  lr {row['lr']:.3g}" + ("  repredicted" if epoch.repredicts else "")
            say(self.console, place + loss + errors + speed + notes)
            self.line_due = now + SECONDS_BETWEEN_LINES

    def _place(self, epoch: Epoch) -> str:
        of = str(self.epochs_of_stage[epoch.stage])
        return f"stage {epoch.stage} epoch {epoch.epoch + 1:{len(of)}}/{of}"
