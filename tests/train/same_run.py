"""Whether two runs ended alike, to the last bit."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from r2d2fast.train.checkpoint import find_checkpoint, read_values
from r2d2fast.train.run_directory import NOT_COMPARED

TIMES = ("seconds", "images_per_second", "outside_network")
PLACES = ("machine", "versions")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in (*TIMES, *PLACES)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def metrics(directory):
    return [without_times(json.loads(line)) for line in (directory / "metrics.jsonl").open()]


def results(directory):
    return without_times(json.loads((directory / "results.json").read_text()))


def state(directory):
    """The last checkpoint's values, and its tensors by name."""
    path, messages = find_checkpoint(directory)
    assert messages == []
    with TemporaryDirectory() as elsewhere:
        whole = Path(elsewhere) / "whole.pt"
        dcp_to_torch_save(path, whole)
        saved = torch.load(whole)
    parts = {
        **saved["network"],
        **saved["optimizer"],
        **{f"averaged/{key}": one for key, one in saved.get("averaged", {}).items()},
    }
    return without_times(read_values(path)), {**parts, "bank": saved["bank"]}


def assert_same_run(directory, other):
    (values, tensors), (expected_values, expected) = state(directory), state(other)
    assert values == expected_values
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert metrics(directory) == metrics(other)
    assert results(directory) == results(other)
    for name in ("labelled.txt", "labels.csv", "network.safetensors"):
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name
    assert settings(directory) == settings(other)


def settings(directory):
    """Of config.json what says which run it is."""
    held = json.loads((directory / "config.json").read_text())
    return {name: value for name, value in held.items() if name not in NOT_COMPARED}
