"""The metrics of each epoch: a line of metrics.jsonl, and what a tracker gets."""

import json
import warnings
from pathlib import Path
from typing import Any

from r2d2fast.train.files import write_atomically, writing
from r2d2fast.train.run_directory import METRICS
from r2d2fast.train.trackers import Tracker

# Where in the schedule: of all metrics these are none.
_PLACE = {"stage", "epoch"}


class Metrics:
    """Writes rows of metrics.

    Args:
        directory: of the run.
        rows: of the epochs done. Lines of epochs after a checkpoint that was gone back to, perhaps a half-written one, go.
        tracker: that gets them, too, if there is one.
        writes: whether this rank does.
    """

    def __init__(self, directory: Path, rows: list[dict[str, Any]], tracker: Tracker | None, writes: bool) -> None:
        self.path = directory / METRICS
        self.epochs = len(rows)
        self.tracker = tracker
        self.writes = writes
        if writes:
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        if not self.writes:
            return
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            numbers = {
                name: value for name, value in row.items() if isinstance(value, int | float) and name not in _PLACE
            }
            try:
                self.tracker.log(numbers, self.epochs)
            except Exception as error:  # a server that is away stops no run
                warnings.warn(
                    f"the tracker did not take epoch {self.epochs} ({error!r}); {self.path} has it", stacklevel=2
                )
        self.epochs += 1
