"""A whole run: epoch after epoch, with metrics, checkpoints, results and pictures in the run directory."""

import math
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from r2d2fast.machine import describe_run, versions
from r2d2fast.models import export_onnx, export_safetensors
from r2d2fast.train.checkpoint import find_checkpoint, keep_good, load_tensors, read_values, save_checkpoint
from r2d2fast.train.config import Config
from r2d2fast.train.directory import LOCK, NETWORK, ONNX, keep_split_file, locked, open_directory, write_results
from r2d2fast.train.errors import ConfigError, DivergenceError, TrainingError
from r2d2fast.train.files import write_atomically
from r2d2fast.train.metrics import Metrics
from r2d2fast.train.parts import bank_file
from r2d2fast.train.pictures import draw_curves, draw_pseudo_labels
from r2d2fast.train.preemption import Pauses
from r2d2fast.train.profile import StepTracer
from r2d2fast.train.progress import Reporter
from r2d2fast.train.pseudo_labels import Moment, save_pseudo_labels
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.sources import load_data
from r2d2fast.train.trainer import Trainer

# Epochs after the last checkpoint are computed again on resuming, to the same bits. Stage 1's epochs can be far shorter than
# it takes to sync a checkpoint to the disk: between two there is so much time, and as many times that of writing one.
SECONDS_BETWEEN_CHECKPOINTS = 2.0
CHECKPOINT_SHARE = 20
# What flags need that is not installed with everything else.
PACKAGES = {"tensorboard": "tensorboard", "onnx": "onnxscript"}


def run(config: Config, directory: Path, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Train as ``config`` (with ``split`` resolved) says, or go on where ``directory`` left off.

    Returns the results, as in ``results.json``. Raises TrainingError.
    """
    for flag, package in PACKAGES.items():
        if getattr(config, flag) and find_spec(package) is None:
            raise ConfigError(f'--{flag}: {package} is not installed; pip install "r2d2fast[{flag}]", or leave it out')
    data, labels = load_data(config, ranks)
    with ExitStack() as locks:
        bank = bank_file(config)
        if bank is not None:
            locks.enter_context(locked(Path(f"{bank}.lock"), ranks, "--bank-storage"))
        trainer = Trainer(config, data, labels, ranks)
        finished = ranks.first(lambda: open_directory(directory, config))
        if finished is not None:
            console.print(f"{directory} holds a finished run; nothing to do.", soft_wrap=True)
            return finished
        locks.enter_context(locked(directory / LOCK, ranks, "--run-dir"))
        ranks.first(lambda: keep_split_file(directory, trainer.data, trainer.labels))
        if config.resume:
            _resume(trainer, directory, console)
        _train(trainer, directory, console)
        results = summarize(config, trainer.rows) | {
            "machine": describe_run(ranks.device, ranks.count),
            "versions": versions(),
        }
        # Rank 0 alone, the others wait; that the results are there says that the run is finished, and so they come last.
        ranks.first(lambda: _finish(trainer, directory, results))
    return results


def evaluate(config: Config, directory: Path, console: Console, ranks: Ranks) -> dict[str, float]:
    """The test errors of the network in the last good checkpoint of ``directory``, in which nothing changes.

    Raises TrainingError if there is none.
    """
    if config.bank_storage != "pinned":
        config = replace(config, bank_storage="device")  # a file may be the bank of a run that goes on
    trainer = Trainer(config, *load_data(config, ranks), ranks)
    path = _find(directory, console, ranks)
    if path is None:
        raise TrainingError(f"{directory} has no checkpoint to evaluate; name the --run-dir of a run that has begun")
    load_tensors(path, {"network": trainer.model.state_dict()}, ranks)
    return trainer.test_errors()


def _find(directory: Path, console: Console, ranks: Ranks) -> Path | None:
    path, messages = ranks.first(lambda: find_checkpoint(directory))
    for message in messages:
        console.print(message, soft_wrap=True)
    return path


def _resume(trainer: Trainer, directory: Path, console: Console) -> None:
    path = _find(directory, console, trainer.ranks)
    if path is None:
        return
    values = read_values(path)
    trainer.load_values(values)
    load_tensors(path, trainer.tensors(), trainer.ranks)
    trainer.ranks.first(lambda: keep_good(path))
    steps = f" and {trainer.step} steps" if trainer.step else ""
    console.print(f"resumed after {len(trainer.rows)} of {len(trainer.schedule)} epochs{steps}")
    now = trainer.precision.name
    before = values.get("precision", now)  # checkpoints of before 2026-11-23 do not say
    if before != now:
        console.print(f"--precision auto, {before} on the machine before, is {now} on this one", soft_wrap=True)


def _train(trainer: Trainer, directory: Path, console: Console) -> None:
    config, ranks = trainer.config, trainer.ranks
    saver = _Saver(trainer, directory)
    pauses = Pauses(ranks, saver.save, lambda: saver.age() >= 60 * config.checkpoint_minutes)
    metrics = Metrics(directory, trainer.rows, config.tensorboard, writes=ranks.rank == 0)
    tracing = closing(StepTracer(directory)) if config.profile and ranks.rank == 0 else nullcontext()
    with tracing as tracer, Reporter(console, trainer.schedule, len(trainer.rows)) as reporter, pauses.watching():

        def pause() -> None:
            if tracer is not None:
                tracer.reached(trainer.schedule[len(trainer.rows)], trainer.step)
            reporter.stepped(trainer.step)
            pauses()

        def predicted() -> None:
            epoch = trainer.schedule[len(trainer.rows)]
            save_pseudo_labels(trainer, directory, Moment(epoch.stage, epoch.epoch, "predicted"))

        for epoch in trainer.schedule[len(trainer.rows) :]:
            try:
                row = trainer.run_epoch(pause, predicted)
            except DivergenceError as error:
                raise TrainingError(f"{error} {saver.last()}") from error
            metrics.append(row)
            reporter.epoch_ended(epoch, row)
            if epoch.stage == 2 and epoch.last:
                save_pseudo_labels(trainer, directory, Moment(epoch.stage, epoch.epoch + 1, "learned"))
            if ranks.largest(epoch.last or saver.due()):
                saver.save()


class _Saver:
    def __init__(self, trainer: Trainer, directory: Path) -> None:
        self.trainer = trainer
        self.directory = directory
        self.at, self.took = time.monotonic(), 0.0
        self.epochs = len(trainer.rows)

    def age(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self.at

    def due(self) -> bool:
        return self.age() >= max(SECONDS_BETWEEN_CHECKPOINTS, CHECKPOINT_SHARE * self.took)

    def save(self) -> None:
        began = self.at = time.monotonic()
        values = self.trainer.values()
        # Within an epoch nobody may have looked at the losses yet. The next look stops the run; the checkpoint stays good.
        if all(map(math.isfinite, values["losses"])):
            save_checkpoint(self.directory, self.trainer.tensors(), values, self.trainer.ranks)
            self.at, self.epochs = time.monotonic(), len(self.trainer.rows)
            self.took = self.at - began

    def last(self) -> str:
        return f"The last good checkpoint, after {self.epochs} epochs, is {self.directory / 'checkpoint'}."


def _finish(trainer: Trainer, directory: Path, results: dict[str, Any]) -> None:
    model, config = trainer.model, trainer.config
    draw_curves(directory, trainer.rows)
    draw_pseudo_labels(directory, trainer.rows)
    about = {"backbone": config.backbone, "dataset": config.dataset, "classes": "\n".join(trainer.data.class_names)}
    write_atomically(directory / NETWORK, export_safetensors(model, about))
    if config.onnx:
        try:
            write_atomically(directory / ONNX, export_onnx(model, trainer.data.train.shape))
        except Exception as error:  # whatever PyTorch's exporter says of a network that it cannot translate
            raise TrainingError(
                f"--onnx: the export failed: {error!r:.500}. Training is done and {directory / NETWORK} written; "
                "--resume tries the export again, or without --onnx ends the run"
            ) from error
    write_results(directory, results)


def summarize(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``results.json`` says of the run itself: errors in percent, each of the last epoch of its stage, never of the best."""
    stages = []
    for stage in config.stages:
        of_stage = [row for row in rows if row["stage"] == stage]
        errors = {name: value for name, value in of_stage[-1].items() if name.startswith("test_error")}
        entry = {
            "stage": stage,
            "epochs": len(of_stage),
            **errors,
            "seconds": sum(row["seconds"] for row in of_stage),
            "images_per_second": _middle(of_stage, "images_per_second"),
            "outside_network": _middle(of_stage, "outside_network"),
        }
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
        **{name: value for name, value in rows[-1].items() if name.startswith("test_error")},
        "seconds": sum(row["seconds"] for row in rows),
        "bad_images": rows[-1]["bad_images"],
    }


def _middle(rows: list[dict[str, Any]], name: str) -> float | None:
    """The upper median of what epochs have measured; None if none has."""
    values = sorted(row[name] for row in rows if row[name] is not None)
    return values[len(values) // 2] if values else None
