"""A run's own directory: whose run it holds, and the files in it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2d2fast.train.checkpoint import CURRENT, PREVIOUS
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.files import write_atomically, writing

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
# A directory with any of them holds a run.
RUN_FILES = (CONFIG, CURRENT, PREVIOUS, METRICS, RESULTS)

# They say where and how to run, not what: two runs that differ in nothing else are the same run.
NOT_COMPARED = ("run_dir", "resume", "dry_run")


def open_directory(directory: Path, config: Config) -> None:
    """Make ``directory`` the run's own, or find that it is already.

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
        return
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


def write_metrics(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Write the metrics of all epochs so far, a line each, in place of what was there."""
    write_atomically(directory / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_metrics(directory: Path, row: dict[str, Any]) -> None:
    """Add the line of one epoch."""
    with writing(directory / METRICS), open(directory / METRICS, "a") as file:
        file.write(json.dumps(row) + "\n")


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write the results; that they are there says that the run is finished."""
    write_atomically(directory / RESULTS, _json(results))


def read_results(directory: Path) -> dict[str, Any] | None:
    """The results of a finished run, None if it is not finished. Raises ConfigError for a damaged file."""
    path = directory / RESULTS
    return _read_json(path) if path.exists() else None


def _comparable(config: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            fields |= {f"{name}.{inner}": entry for inner, entry in value.items()}
        elif name not in NOT_COMPARED:
            fields[name] = value
    # Through JSON and back, so that a tuple here equals the list that was read there.
    return json.loads(_json(fields))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): restore it, or name another --run-dir") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object: restore it, or name another --run-dir")
    return value


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
