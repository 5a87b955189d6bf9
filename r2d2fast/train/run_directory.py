"""A run's own directory: whose run it holds, and the files in it."""

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2d2fast.data import DataError, Dataset, read_split, write_split
from r2d2fast.train.checkpoint import CURRENT, PREVIOUS
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.files import write_atomically, writing
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import flags

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
SPLIT = "labelled.txt"
NETWORK = "network.safetensors"
ONNX = "network.onnx"
LOCK = "lock"
# A directory with any of them holds a run.
RUN_FILES = (CONFIG, CURRENT, PREVIOUS, METRICS, RESULTS)

# They say where and how to run, not what: two runs that differ in nothing else are the same run.
NOT_COMPARED = {
    *(
        "data_dir",
        "download",
        "run_dir",
        "resume",
        "eval_only",
        "dry_run",
        "runs",
        "device",
        "threads",
        "compile",
        "workers",
    ),
    *("decoder", "log_interval", "checkpoint_minutes", "tensorboard", "profile", "onnx", "bank_storage"),
}


def open_directory(directory: Path, config: Config) -> dict[str, Any] | None:
    """Make ``directory`` the run's own, or find that it is already. Returns the results of a finished run.

    Raises ConfigError if it holds a run and ``config.resume`` is off, or a run of another or an unknown configuration;
    TrainingError if it cannot be written.
    """
    path = directory / CONFIG
    asked = _comparable(config)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        found = [name for name in RUN_FILES if (directory / name).exists()]
    if not found:
        write_atomically(path, _json(asked))
        return None
    if CONFIG not in found:
        raise ConfigError(
            f"{directory} already holds a run ({', '.join(found)}) but no {CONFIG}, so which run it is cannot be told: "
            f"restore {CONFIG}, or name another --run-dir"
        )
    if not config.resume:
        raise ConfigError(f"{directory} already holds a run: go on with it by --resume, or name another --run-dir")
    held = _read_json(path)
    differing = sorted(name for name in asked.keys() | held.keys() if asked.get(name) != held.get(name))
    if differing:
        differences = "; ".join(f"{name} is {held.get(name)} there, {asked.get(name)} asked for" for name in differing)
        raise ConfigError(
            f"{directory} holds a run of another configuration: {differences}. "
            "Resume it with the same flags, or name another --run-dir"
        )
    return _read_json(directory / RESULTS) if RESULTS in found else None


@contextmanager
def locked(path: Path, ranks: Ranks, flag: str) -> Iterator[None]:
    """Keep every other process from what the file ``path`` stands for while the context lasts; all ranks of the run enter it.

    Two runs that write one checkpoint at once can leave none that is good. Raises ConfigError where another has it; the way out
    is another name for ``flag``. File systems without locks give none.
    """
    with ExitStack() as held:
        ranks.on_first(lambda: _lock(path, flag, held))
        yield


def _lock(path: Path, flag: str, held: ExitStack) -> None:
    try:
        file = held.enter_context(path.open("a"))
        # Of the process, and gone with it: loader processes that outlive a killed one for seconds do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.filename is not None:
            raise ConfigError(
                f"{flag} {path}: cannot be written ({error.strerror}); make its folder, mend its permissions, free some space, "
                "or name another"
            ) from error
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"another process that trains has locked {path}: wait for it or end it, or name another {flag}"
            ) from error


def keep_split_file(directory: Path, dataset: Dataset, labels: Tensor) -> None:
    """Write which samples are labelled, as ``--split-file`` reads it.

    Raises ConfigError where the run began with other labels: of another file of this name, or of images that have changed.
    """
    path = directory / SPLIT
    try:
        if not path.exists():
            write_split(path, dataset.train_names, labels, dataset.class_names)
            return
        same = torch.equal(read_split(path, dataset.train_names, dataset.class_names), labels)
    except DataError as error:
        raise TrainingError(str(error)) from error
    if not same:
        raise ConfigError(
            f"the labelled samples are not those of {path}, with which this run began: "
            "resume it with the same images and split file, or name another --run-dir"
        )


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write the results; that they are there says that the run is finished."""
    write_atomically(directory / RESULTS, _json(results))


def _comparable(config: Config) -> dict[str, Any]:
    # Through JSON and back, so that a tuple here equals the list that was read there.
    return json.loads(_json({name: value for name, value in flags(config).items() if name not in NOT_COMPARED}))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): restore it, or name another --run-dir") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object: restore it, or name another --run-dir")
    return value


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
