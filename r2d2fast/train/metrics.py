"""The metrics of each epoch: a line of metrics.jsonl, and what TensorBoard reads."""

import json
from pathlib import Path
from typing import Any

from r2d2fast.train.files import write_atomically, writing
from r2d2fast.train.run_directory import METRICS


class Metrics:
    """Writes rows of metrics.

    Args:
        directory: of the run.
        rows: of the epochs done. Lines of epochs after a checkpoint that was gone back to, perhaps a half-written one, go.
        tensorboard: whether to write for TensorBoard, too, whose package has to be installed.
        writes: whether this rank does.
    """

    def __init__(self, directory: Path, rows: list[dict[str, Any]], tensorboard: bool, writes: bool) -> None:
        self.path = directory / METRICS
        self.epochs = len(rows)
        self.writer = None
        if tensorboard and writes:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=self.epochs)
        self.writes = writes
        if writes:
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        if not self.writes:
            return
        with writing(self.path):
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.writer is not None:
                for name, value in row.items():
                    if value is not None and name not in ("stage", "epoch"):
                        self.writer.add_scalar(name, value, self.epochs)
                self.writer.flush()
        self.epochs += 1
