import subprocess

import pytest
import torch

import r2d2fast
from r2d2fast import cuda_toolkit, machine


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
    assert machine.versions()["commit"] == head[:12]
    (installed / "r2d2fast" / "__init__.py").write_text("changed = True\n")
    assert machine.versions()["commit"] == f"{head[:12]}-dirty"


def test_the_checkout_of_a_project_that_only_holds_an_installation_is_not_ours(installed):
    git(installed, "add", "other.py")
    git(installed, "commit", "-m", "first")
    assert machine.versions()["commit"] is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.versions()["commit"] is None


def test_a_run_s_machine_and_versions():
    described = machine.describe_run(torch.device("cpu"), processes=2)
    assert (described["gpu"], described["processes"], described["threads"]) == (None, 2, torch.get_num_threads())
    assert machine.describe()["cpu"].startswith(described["cpu"])
    assert machine.versions()["torch"] == torch.__version__
    assert machine.versions()["r2d2fast"] == r2d2fast.__version__


def test_what_is_not_there_is_said(monkeypatch, tmp_path):
    for name in ("PATH", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", lambda _: None)
    assert cuda_toolkit.find_cuda_tool("nvdisasm") is None
    found = machine.describe_toolchain()
    assert found["compiler"] == "not found (needed only to build the cpu backend)"
    assert "not" in found["gpu_driver"]


def test_a_cuda_tool_is_found_under_cuda_home_and_on_path_first(monkeypatch, tmp_path):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "some-tool").write_text("#!/bin/sh\n")
        (tmp_path / folder / "some-tool").chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolkit.find_cuda_tool("some-tool") == str(tmp_path / "home/bin/some-tool")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert cuda_toolkit.find_cuda_tool("some-tool") == str(tmp_path / "path/some-tool")


def test_gpus_and_variables_are_described_in_words():
    gpu = {"device": "cuda:0", "name": "H [x]", "memory_bytes": 2**36, "architecture": "sm_90", "multiprocessors": 132}
    text = machine.as_text({"gpus": [gpu, gpu], "variables": {"A": "1", "B": "2"}, "torch": "3"})
    assert text["gpus"] == "\n".join(["cuda:0: H [x], 64.0 GiB, sm_90, 132 multiprocessors"] * 2)
    assert (text["variables"], text["torch"]) == ("A=1, B=2", "3")
    assert machine.as_text({"gpus": []}) == {"gpus": "none found by PyTorch"}
