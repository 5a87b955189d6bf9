"""A whole run: epoch after epoch, with metrics, checkpoints, results and pictures in the run directory."""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from r2d2fast.data import load_dataset
from r2d2fast.train.checkpoint import CURRENT, load_checkpoint, save_checkpoint
from r2d2fast.train.config import Config
from r2d2fast.train.directory import append_metrics, open_directory, read_results, write_metrics, write_results
from r2d2fast.train.errors import DivergenceError, TrainingError
from r2d2fast.train.pictures import draw_curves, draw_pseudo_labels
from r2d2fast.train.progress import Reporter
from r2d2fast.train.trainer import Trainer

# Syncing a checkpoint to the disk can take longer than one of stage 1's short epochs. Epochs after the last checkpoint
# are computed again on resuming, to the same bits.
SECONDS_BETWEEN_CHECKPOINTS = 2.0


def run(config: Config, directory: Path, console: Console) -> dict[str, Any]:
    """Train as ``config`` (with ``split`` and ``device`` resolved) says, or go on where ``directory`` left off.

    Returns the results, as in ``results.json``. Raises TrainingError.
    """
    trainer = Trainer(config, load_dataset(config.dataset))
    open_directory(directory, config)
    finished = read_results(directory)
    if finished is not None:
        console.print(f"{directory} holds a finished run; nothing to do.", soft_wrap=True)
        return finished
    state, messages = load_checkpoint(directory) if config.resume else (None, [])
    for message in messages:
        console.print(message, soft_wrap=True)
    if state is not None:
        trainer.load_state_dict(state)
        console.print(f"resumed after {len(trainer.rows)} of {len(trainer.schedule)} epochs")
    # Lines of epochs after the checkpoint, perhaps a half-written one, go; they will be written again.
    write_metrics(directory, trainer.rows)

    saved_at, saved_epochs = time.monotonic(), len(trainer.rows)
    with Reporter(console, trainer.schedule, len(trainer.rows)) as reporter:
        for epoch in trainer.schedule[len(trainer.rows) :]:
            try:
                row = trainer.run_epoch()
            except DivergenceError as error:
                raise TrainingError(
                    f"{error} The last good checkpoint, after {saved_epochs} epochs, is {directory / CURRENT}."
                ) from error
            append_metrics(directory, row)
            reporter.epoch_ended(epoch, row)
            if epoch.last or time.monotonic() - saved_at >= SECONDS_BETWEEN_CHECKPOINTS:
                save_checkpoint(directory, trainer.state_dict())
                saved_at, saved_epochs = time.monotonic(), len(trainer.rows)

    draw_curves(directory, trainer.rows)
    draw_pseudo_labels(directory, trainer.rows)
    results = summarize(config, trainer.rows)
    write_results(directory, results)
    return results


def summarize(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of ``results.json``: errors in percent, each of the last epoch of its stage, never of the best."""
    stages = []
    for stage in config.stages:
        of_stage = [row for row in rows if row["stage"] == stage]
        entry = {"stage": stage, "epochs": len(of_stage), "test_error": of_stage[-1]["test_error"]}
        if stage == 2:
            first = min(config.stage2.repredict_epochs, default=config.stage2.epochs)
            entry["d2_test_error"] = of_stage[first - 1]["test_error"]
        stages.append(entry)
    return {
        "dataset": config.dataset,
        "split": config.split,
        "seed": config.seed,
        "num_labels": config.num_labels,
        "stages": stages,
        "test_error": rows[-1]["test_error"],
        "seconds": sum(row["seconds"] for row in rows),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
