"""The digits as embeddings: every estimator learns, and is charged for its own time and memory."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn.datasets import load_digits

import bench.embeddings as command
from bench import mapped_embeddings
from bench.embeddings import ESTIMATORS, OURS, Fit, fit_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    digits = load_digits()
    x, y = digits.data.astype(np.float32), digits.target
    for name, part in (("train", slice(360, None)), ("test", slice(360))):
        np.save(folder / f"{name}.npy", x[part])
        np.save(folder / f"{name}_labels.npy", y[part])
    return folder


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_learns_from_fifty_labels(folder, name):
    found = fit_here(folder, name, labels=50, seed=0)
    assert (found.estimator, found.labels, found.seed) == (name, 50, 0)
    assert 1 < found.test_error < 30
    assert 1 < found.unlabelled_error < 30
    assert found.processor_seconds > 0
    # Another draw of the labels, another result.
    assert fit_here(folder, name, labels=50, seed=1).unlabelled_error != found.unlabelled_error


@pytest.mark.slow
def test_the_command_fits_in_processes_of_their_own_and_writes_all_of_it(folder, tmp_path, capsys):
    names = ("LogisticRegression",)
    command.main(folder, labels=(50,), seeds=(0,), estimators=names, json=tmp_path / "fits.json")
    printed = capsys.readouterr().out
    assert "1437 x 64 float32, 0 MB; 1 threads." in printed
    fits = [Fit(**one) for one in json.loads((tmp_path / "fits.json").read_text())["fits"]]
    for one in fits:
        here = fit_here(folder, one.estimator, one.labels, one.seed)
        assert (one.test_error, one.unlabelled_error) == (here.test_error, here.unlabelled_error)
        assert 0 < one.memory < 300e6
    assert command.table(fits, np.load(folder / "train.npy").nbytes).splitlines()[2] in printed


def test_an_unknown_estimator_is_named(folder):
    with pytest.raises(SystemExit, match=r"--estimators nobody: unknown; accepted: R2D2"):
        command.main(folder, estimators=("nobody",))


@pytest.mark.slow
def test_a_fit_that_fails_is_named_with_its_reason(folder):
    with pytest.raises(
        RuntimeError, match=r"LogisticRegression, 7 labels, seed 0: ValueError: num_labels is 7; it must be"
    ):
        command.fit(folder, "LogisticRegression", 7, 0, threads=1)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("kill -KILL $$", r"ended by SIGKILL, as the system does where memory runs out; leave it out by --estimators"),
        ("kill -TERM $$", r"ended by SIGTERM$"),
        ("exit 3", r"exit status 3$"),
    ],
)
def test_a_fit_that_ends_without_a_word_is_named_with_how_it_ended(folder, tmp_path, monkeypatch, end, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(RuntimeError, match=rf"LabelSpreading, 40 labels, seed 2: {reason}"):
        command.fit(folder, "LabelSpreading", 40, 2, threads=1)


def test_targets_are_those_of_the_slowest_fit_and_the_largest():
    one = Fit(OURS, 40, 0, 40.0, 40.0, 20.0, 20.0, 500)
    fits = [one, dataclasses.replace(one, seconds=31.0, memory=10**9)]
    fits.append(dataclasses.replace(one, estimator="LabelSpreading", seconds=279.0))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in command.targets(fits, 256 * 10**6).splitlines()
    ]
    assert rows[2:] == [
        ["seconds of a fit", "31.0", "≤ 30", "**not met**"],
        ["MB beside X", "744", "≤ 300", "**not met**"],
        ["times as fast as LabelSpreading", "9.0", "≥ 8", "met"],
    ]
    assert command.table(fits, 0).count("40.00 ± 0.00") == 2


def test_an_epoch_from_a_mapped_file_is_measured_beside_its_products(tmp_path, capsys):
    mapped_embeddings.main(samples=9000, features=16, classes=10, threads=1, folder=tmp_path)
    printed = capsys.readouterr().out
    assert "9000 x 16 float16, 10 classes, 1 threads" in printed
    (times,) = re.findall(r"products alone [\d.]+: ([\d.]+) times", printed)
    assert float(times) > 1
    assert not list(tmp_path.iterdir())
