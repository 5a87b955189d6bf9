"""A run's own directory: whose run it holds, and the files in it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from r2d2fast.data import DataError, Dataset, read_split, write_split
from r2d2fast.train.checkpoint import CURRENT, PREVIOUS
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError, TrainingError
from r2d2fast.train.files import write_atomically, writing
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES, flags, is_known, override

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
SPLIT = "labelled.txt"
NETWORK = "network.safetensors"
ONNX = "network.onnx"
LOCK = "lock"
# A directory with any of them holds a run.
RUN_FILES = (CONFIG, CURRENT, PREVIOUS, METRICS, RESULTS)

# What one command does, and the next one need not.
OF_A_COMMAND = {
    *("download", "config", "run_dir", "resume", "eval_only", "dry_run", "runs", "schedule_scale"),
    *("tracker", "profile", "onnx"),
}
# They say where and how to run, not what: two runs that differ in nothing else are the same run.
NOT_COMPARED = OF_A_COMMAND | {
    *("data_dir", "device", "threads", "compile", "cuda_graphs", "workers", "decoder", "log_interval"),
    *("checkpoint_minutes", "bank_storage"),
}


def open_directory(directory: Path, config: Config) -> dict[str, Any] | None:
    """Make ``directory`` the run's own, or find that it is already. Returns the results of a finished run.

    Of several runs (``config.runs``) a finished one counts as it is, so that those which are missing can be added; any other run
    is gone on with on request only. Raises ConfigError if there is a run and ``config.resume`` is off, or a run of another or an
    unknown configuration; TrainingError if the directory cannot be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if not _run_files(directory):
        write_atomically(directory / CONFIG, _json(_settings(config)))
        return None
    _check_known(directory)
    finished = (directory / RESULTS).exists()
    if not (config.resume or (config.runs > 1 and finished)):
        without = "" if finished else ", which is not finished"
        raise ConfigError(
            f"{directory} already holds a run{without}: go on with it by --resume, or name another --run-dir"
        )
    check_same_run(directory, config)
    return _read_json(directory / RESULTS) if finished else None


def check_same_run(directory: Path, config: Config) -> None:
    """Raise ConfigError where ``directory`` holds a run of another configuration, or of one that cannot be told."""
    _check_known(directory)
    check_settings(directory, config)


def check_settings(directory: Path, config: Config) -> None:
    """Raise ConfigError where ``config.json`` in ``directory`` has other settings; nothing where there is no such file."""
    if not (directory / CONFIG).exists():
        return
    held, asked = _read_json(directory / CONFIG), _settings(config)
    differing = sorted(
        name for name in (asked.keys() | held.keys()) - NOT_COMPARED if asked.get(name) != held.get(name)
    )
    if differing:
        differences = "; ".join(
            f"{name} is {_shown(held, name)} there, {_shown(asked, name)} asked for" for name in differing
        )
        raise ConfigError(
            f"{directory} holds a run of another configuration: {differences}. "
            "Leave these flags out, and its own settings are taken, or name another --run-dir"
        )


def _check_known(directory: Path) -> None:
    found = _run_files(directory)
    if CONFIG not in found:
        raise ConfigError(
            f"{directory} already holds a run ({', '.join(found)}) but no {CONFIG}, so which run it is cannot be told: "
            f"restore {CONFIG}, or name another --run-dir"
        )


def read_config(directory: Path) -> Config | None:
    """The configuration of the run in ``directory``; None if there is none. Raises ConfigError for a damaged one."""
    path = directory / CONFIG
    return read_settings(path) if path.exists() else None


def read_settings(path: Path) -> Config:
    """The configuration in a run's ``config.json``. Raises ConfigError for a file that is none, or damaged."""
    held = _read_json(path)
    dataset = held.get("dataset")
    if not isinstance(dataset, str) or not is_known(dataset):
        raise ConfigError(
            f"{path}: dataset is {dataset!r}; accepted: {', '.join(RECIPES)}. Restore the file, or name another"
        )
    # What a newer version has no value for in an older one's run is the recipe's, and found to differ where that counts.
    recipe = replace(RECIPES.get(dataset, RECIPES["folder"]).config, dataset=dataset)
    return override(
        recipe,
        {name: _as_type_of(value, held[name], name, path) for name, value in flags(recipe).items() if name in held},
    )


# Beside data_dir, which every recipe has.
_PATHS = ("split_file", "pretrained")


def _as_type_of(usual: Any, held: Any, name: str, path: Path) -> Any:
    """What JSON ``held`` stands for, of a setting whose recipe has the value ``usual``."""
    if isinstance(held, str) and (isinstance(usual, Path) or name in _PATHS):
        return Path(held)
    if isinstance(held, list) and isinstance(usual, tuple):
        return tuple(held)
    number = isinstance(held, int | float) and not isinstance(held, bool)
    if (isinstance(usual, float) and number) or type(held) is type(usual) or usual is None:
        return held
    if held is None and _takes_none(name):  # as the other methods do where R2-D2's recipe has a number
        return held
    raise ConfigError(
        f"{path}: {name} is {held!r}, in place of {usual!r} or the like: restore it, or name another --run-dir"
    )


def _takes_none(name: str) -> bool:
    kind: Any = Config
    for part in name.split("."):
        kind = get_type_hints(kind)[part]
    return type(None) in get_args(kind)


def _run_files(directory: Path) -> list[str]:
    return [name for name in RUN_FILES if (directory / name).exists()]


def _shown(settings: dict[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "unknown"


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
        # Of the process, and gone with it: loader processes that outlive a killed one for seconds do not hold it.
        held.enter_context(FileLock(path, blocking=False))
    except Timeout as error:
        raise ConfigError(
            f"another process that trains has locked {path}: wait for it or end it, or name another {flag}"
        ) from error
    except OSError as error:
        if error.filename is not None:
            raise ConfigError(
                f"{flag} {path}: cannot be written ({error.strerror}); make its folder, mend its permissions, free some space, "
                "or name another"
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


def _settings(config: Config) -> dict[str, Any]:
    """All that ``config.json`` has."""
    settings = {name: value for name, value in flags(config).items() if name not in OF_A_COMMAND}
    # To be found by a command that is given in another folder.
    settings["data_dir"] = config.data_dir.absolute()
    # Through JSON and back, so that a tuple here equals the list that was read there.
    return json.loads(_json(settings))


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
