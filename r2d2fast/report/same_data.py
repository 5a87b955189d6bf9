"""Which runs were trained on the same data, where the name of the data set does not say what these are."""

import csv
import hashlib
import json
from typing import NamedTuple

import safetensors

from r2d2fast.report.runs import Run
from r2d2fast.train.labels import LABELS
from r2d2fast.train.recipes import IN_PYTHON
from r2d2fast.train.run_directory import NETWORK

NAMELESS = ("folder", "embeddings", IN_PYTHON)


class Data(NamedTuple):
    """Data of a run; equal where two runs had the same.

    Attributes:
        directory: of the first run that had them.
        recorded: what runs have recorded of them; "" where no run on this directory is finished.
    """

    directory: str | None
    recorded: str


def data_of(runs: list[Run]) -> list[Data | None]:
    """The data of each of the runs; None where the name of the data set says all."""
    # A path alone tells neither that a copy on another machine is the same nor that a folder has been filled anew. A finished
    # run has recorded enough for both, and what it has holds for the unfinished ones on its directory.
    recorded = [_recorded(run) if run.config["dataset"] in NAMELESS else "" for run in runs]
    places = [run.config.get("data_dir") for run in runs]
    of_place = {place: content for place, content in zip(places, recorded, strict=True) if content}
    first: dict[str, str | None] = {}
    data: list[Data | None] = []
    for run, place, content in zip(runs, places, recorded, strict=True):
        content = content or of_place.get(place, "")
        directory = first.setdefault(content, place) if content else place
        data.append(Data(directory, content) if run.config["dataset"] in NAMELESS else None)
    return data


def _recorded(run: Run) -> str:
    """A digest of the names of the training samples, the classes, the kind and shape of the input, the spread of its channels or
    features, and the number of test samples; "" for a run that is not finished, or lacks a file."""
    if run.results is None:
        return ""
    try:
        with (run.directory / LABELS).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            names = [row[:1] for row in csv.reader(file)]
        with safetensors.safe_open(run.directory / NETWORK, "np") as network:
            about = network.metadata() or {}
            preprocessing = json.loads(about["preprocessing"])
            of_features = network.get_tensor("scaling.std").tolist() if preprocessing["kind"] == "embeddings" else []
    except (OSError, ValueError, KeyError, csv.Error, safetensors.SafetensorError):
        return ""
    # Rounded, as the last bits depend on the device.
    spread = [f"{value:.3g}" for value in (*of_features, *preprocessing.pop("std"))]
    del preprocessing["mean"]
    content = [names, about["classes"], preprocessing, spread, run.results.get("test_images")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
