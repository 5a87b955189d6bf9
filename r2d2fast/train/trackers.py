"""Experiment trackers, which show the metrics of a run beside those of others: one small adapter each.

The packages are optional. Where a run goes on, so does its entry in the tracker: its name there is kept in the run directory.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from r2d2fast.train.config import TrackerName
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.files import write_atomically

PROJECT = "r2d2fast"
IDENTITY = "tracker.json"


class Tracker(Protocol):
    """An entry that is open. Epochs that a run computes again after a crash, to the same bits, may come twice."""

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        """Add the metrics of an epoch, counted from the beginning of the run."""

    def close(self, failed: bool) -> None:
        """The run ends, or stops; ``failed``: by an error."""


def start_tracker(name: TrackerName, directory: Path, settings: dict[str, Any], epochs: int) -> Tracker | None:
    """The entry of the run in ``directory``, of which so many ``epochs`` are done. Raises ConfigError where there can be none."""
    if name == "none":
        return None
    path = directory / IDENTITY
    known = json.loads(path.read_bytes()) if path.exists() else {}
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
    }
    try:
        tracker = _TRACKERS[name](directory, plain, epochs, known.get(name))
    except Exception as error:  # whatever a tracker's own code says of a server or an account
        raise ConfigError(
            f"--tracker {name}: {error!r:.500}. Is its server there, and its account? {_OFFLINE[name]}, or leave the flag out"
        ) from error
    if tracker.identity != known.get(name):
        write_atomically(path, json.dumps(known | {name: tracker.identity}).encode())
    return tracker


class _TensorBoard:
    identity = None

    def __init__(self, directory: Path, settings: dict[str, Any], epochs: int, identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=epochs)

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, directory: Path, settings: dict[str, Any], epochs: int, identity: str | None) -> None:
        import wandb

        self.identity = identity or secrets.token_hex(4)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            id=self.identity,
            resume="allow",
            dir=directory,
            config=settings,
        )

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        self.run.log(metrics, step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, directory: Path, settings: dict[str, Any], epochs: int, identity: str | None) -> None:
        import trackio

        self.identity = identity or f"{directory.name}-{secrets.token_hex(4)}"
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=self.identity, resume="allow", config=settings
        )

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        self.run.log(metrics, step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, directory: Path, settings: dict[str, Any], epochs: int, identity: str | None) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        if identity is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self.client.get_experiment_by_name(name)
            number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
            identity = self.client.create_run(number, run_name=directory.name).info.run_id
            for key, value in settings.items():
                self.client.log_param(identity, key, value)
        else:
            self.client.update_run(identity, status="RUNNING")
        self.identity = identity

    def log(self, metrics: dict[str, float], epoch: int) -> None:
        for name, value in metrics.items():
            self.client.log_metric(self.identity, name, value, step=epoch)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}
_OFFLINE = {
    "tensorboard": "It needs none",
    "wandb": "Set WANDB_MODE=offline to write into the run directory, for `wandb sync` later",
    "trackio": "It needs none, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names one",
    "mlflow": "Set MLFLOW_TRACKING_URI=sqlite:///mlflow.db to write into a file",
}
