"""A whole run: epoch after epoch, with metrics, checkpoints, results and pictures in the run directory."""

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from r2d2fast.data import Dataset, PhotographImages
from r2d2fast.machine import describe_run, versions
from r2d2fast.models import export_onnx, export_safetensors
from r2d2fast.tables import counted, say
from r2d2fast.train.build import bank_file
from r2d2fast.train.captured_steps import check_cuda_graphs
from r2d2fast.train.checkpoint import find_checkpoint, keep_good, load_tensors, read_values
from r2d2fast.train.config import Config
from r2d2fast.train.data_summary import print_data
from r2d2fast.train.errors import ConfigError, DivergenceError, TrainingError
from r2d2fast.train.files import write_atomically
from r2d2fast.train.labels import write_labels
from r2d2fast.train.load_data import load_data
from r2d2fast.train.network_file import describe_network
from r2d2fast.train.pictures import draw_curves, draw_pseudo_labels
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.run_callback import RunCallback
from r2d2fast.train.run_directory import (
    LOCK,
    NETWORK,
    ONNX,
    check_same_run,
    check_settings,
    keep_split_file,
    locked,
    open_directory,
    write_results,
)
from r2d2fast.train.schedule import images_seen
from r2d2fast.train.state import load_values, tensors
from r2d2fast.train.summary import NAMED
from r2d2fast.train.threads import cpu_threads
from r2d2fast.train.trainer import Trainer


def run(
    config: Config, directory: Path, console: Console, ranks: Ranks, data: tuple[Dataset, Tensor] | None = None
) -> dict[str, Any]:
    """Train as ``config`` (with ``split`` resolved) says, or go on where ``directory`` left off.

    ``data``: what it trains on, made for this rank's device, and int64 ``[M]``, −1 for an unlabelled sample; None takes what the
    configuration names.

    Returns the results, as in ``results.json``. Raises TrainingError.
    """
    _check_packages(config)
    if config.cuda_graphs:
        check_cuda_graphs(config, ranks, Precision(config.precision, ranks.device))
    if config.resume:
        ranks.on_first(lambda: check_settings(directory, config))  # before data of another set are looked for
    dataset, labels = load_data(config, ranks) if data is None else data
    with ExitStack() as locks:
        bank = bank_file(config)
        if bank is not None:
            locks.enter_context(locked(Path(f"{bank}.lock"), ranks, "--bank-storage"))
        print_data(config, dataset, labels, console)
        trainer = Trainer(config, dataset, labels, ranks)
        finished = ranks.on_first(lambda: open_directory(directory, config))
        if finished is not None:
            say(console, f"{directory} holds a finished run; nothing to do.")
            return finished
        locks.enter_context(locked(directory / LOCK, ranks, "--run-dir"))
        ranks.on_first(lambda: keep_split_file(directory, trainer.data, trainer.labels))
        if config.resume:
            _resume(trainer, directory, console)
        if ranks.device.type == "cpu":
            say(console, _threads(trainer))
            if isinstance(dataset.train, PhotographImages):
                say(
                    console,
                    "Photographs take a CPU long: with --dry-run this command says how long, and what takes less.",
                )
        _train(trainer, directory, console)
        with cpu_threads(trainer.threads):  # whose number is in the description
            write_labels(trainer, directory, console)
            about = {"machine": describe_run(ranks.device, ranks.count), "versions": versions()}
        trained = {(row["stage"], row["epoch"]) for row in trainer.history}
        epochs = [epoch for epoch in trainer.schedule if (epoch.stage, epoch.epoch) in trained]
        bad_images = {**dataset.train.bad_images, **dataset.test.bad_images}
        bad = {name: why for of_rank in ranks.gather_objects(bad_images) for name, why in of_rank.items()}
        counts = {
            "num_labels": len(trainer.labelled),
            "images_seen": images_seen(config, epochs, len(trainer.labelled), len(trainer.unlabelled)),
            "held_out": dataset.held_out,
            "test_images": len(dataset.test_labels),
            "bad_images": len(bad),
            "bad_images_named": dict(islice(sorted(bad.items()), NAMED)),
        }
        results = summarize(config, trainer.history) | counts | about
        # Rank 0 alone, the others wait; that the results are there says that the run is finished, and so they come last.
        ranks.on_first(lambda: _finish(trainer, directory, results))
    return results


def _check_packages(config: Config) -> None:
    """Raise ConfigError for what flags need that is not installed with everything else."""
    needed = {"--onnx": ("onnx", "onnxscript")} if config.onnx else {}
    if config.tracker != "none":
        needed[f"--tracker {config.tracker}"] = (config.tracker, config.tracker)
    for flag, (extra, package) in needed.items():
        if find_spec(package) is None:
            raise ConfigError(f'{flag}: {package} is not installed; pip install "r2d2fast[{extra}]", or leave it out')


def evaluate(config: Config, directory: Path, console: Console, ranks: Ranks) -> dict[str, float | None]:
    """The test errors of the network in the last good checkpoint of ``directory``, in which nothing changes.

    Raises TrainingError if there is none, or the data set has not the classes that the run has learned.
    """
    if config.bank_storage != "pinned":
        config = replace(config, bank_storage="device")  # a file may be the bank of a run that goes on
    path = _find(directory, console, ranks)
    if path is None:
        raise TrainingError(f"{directory} has no checkpoint to evaluate; name the --run-dir of a run that has begun")
    ranks.on_first(lambda: check_same_run(directory, config))
    trainer = Trainer(config, *load_data(config, ranks), ranks)
    values = read_values(path)
    _check_classes(values, trainer, directory)
    # Within a stage the average of the weights is what is evaluated.
    trainer.go_to(values["position"][0])
    load_tensors(path, {name: tensors(trainer)[name] for name in ("network", "averaged")}, ranks)
    with cpu_threads(trainer.threads):
        return trainer.evaluator.test_errors(trainer.data)


def _find(directory: Path, console: Console, ranks: Ranks) -> Path | None:
    path, messages = ranks.on_first(lambda: find_checkpoint(directory))
    for message in messages:
        say(console, message)
    return path


def _resume(trainer: Trainer, directory: Path, console: Console) -> None:
    path = _find(directory, console, trainer.ranks)
    if path is None:
        return
    values = read_values(path)
    _check_classes(values, trainer, directory)
    load_values(trainer, values)
    load_tensors(path, tensors(trainer), trainer.ranks)
    trainer.ranks.on_first(lambda: keep_good(path))
    epochs, step = trainer.position
    steps = f" and {counted(step, 'step')}" if step else ""
    console.print(f"resumed after {epochs} of {len(trainer.schedule)} epochs{steps}")
    before, now = values["precision"], trainer.precision.name
    if before != now:
        say(console, f"--precision auto, {before} on the machine before, is {now} on this one")


def _check_classes(values: dict[str, Any], trainer: Trainer, directory: Path) -> None:
    """Raise ConfigError unless the data set's classes are those of a checkpoint: a network knows only their numbers."""
    learned, found = values["classes"], list(trainer.data.class_names)
    if learned != found:
        place, before, now = next(
            (place, *pair) for place, pair in enumerate(zip_longest(learned, found)) if pair[0] != pair[1]
        )
        raise ConfigError(
            f"the run in {directory} has learned {len(learned)} classes, --data-dir {trainer.config.data_dir} has {len(found)}: "
            f"number {place} is {before!r} there and {now!r} here; name a data set with the same classes"
        )


def _threads(trainer: Trainer) -> str:
    chosen = trainer.config.threads == 0 and trainer.position == (0, 0)
    return f"{trainer.threads} CPU thread{'s' * (trainer.threads > 1)}" + ", by the work of a step" * chosen


def _train(trainer: Trainer, directory: Path, console: Console) -> None:
    with RunCallback(trainer, directory, console) as callback:
        trainer.callback = callback
        try:
            trainer.fit()
        except DivergenceError as error:
            raise TrainingError(f"{error} {callback.checkpoints.last()}") from error


def _finish(trainer: Trainer, directory: Path, results: dict[str, Any]) -> None:
    model, config = trainer.model, trainer.config
    draw_curves(directory, trainer.history, config.method)
    draw_pseudo_labels(directory, trainer.history)
    write_atomically(directory / NETWORK, export_safetensors(model, describe_network(trainer)))
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
        if stage == 2 and config.method == "r2d2":
            first = min(config.stage2.repredict_epochs, default=config.stage2.epochs)
            entry["d2_test_error"] = of_stage[first - 1]["test_error"]
        stages.append(entry)
    return {
        "dataset": config.dataset,
        "split": config.split,
        "seed": config.seed,
        "stages": stages,
        **{name: value for name, value in rows[-1].items() if name.startswith("test_error")},
        "seconds": sum(row["seconds"] for row in rows),
    }


def _middle(rows: list[dict[str, Any]], name: str) -> float | None:
    """The upper median of what epochs have measured; None if none has."""
    values = sorted(row[name] for row in rows if row[name] is not None)
    return values[len(values) // 2] if values else None
