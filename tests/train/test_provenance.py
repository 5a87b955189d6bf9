import json
import subprocess

import pytest
import torch

import r2d2fast
from r2d2fast.train.provenance import machine, versions
from r2d2fast.train.ranks import Ranks


def git(directory, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", directory, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package in a git checkout, which the running code is said to be."""
    package = tmp_path / "project" / "r2d2fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "project" / "other.py").write_text("")
    git(tmp_path / "project", "init")
    monkeypatch.setattr(r2d2fast, "__file__", str(package / "__init__.py"))
    return tmp_path / "project"


def test_the_commit_of_a_checkout_and_whether_files_differ_from_it(installed):
    git(installed, "add", "r2d2fast")
    git(installed, "commit", "-m", "first")
    command = ["git", "-C", installed, "rev-parse", "HEAD"]
    head = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert versions()["commit"] == head[:12]
    (installed / "r2d2fast" / "__init__.py").write_text("changed = True\n")
    assert versions()["commit"] == f"{head[:12]}-dirty"


def test_the_checkout_of_a_project_that_only_holds_an_installation_is_not_ours(installed):
    git(installed, "add", "other.py")
    git(installed, "commit", "-m", "first")
    assert versions()["commit"] is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] is None


def test_results_name_machine_and_versions(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["machine"] == machine(Ranks(), 1)
    assert results["machine"]["processes"] == 1
    assert results["machine"]["gpu"] is None
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["r2d2fast"] == r2d2fast.__version__
