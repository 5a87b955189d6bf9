"""Two processes with gloo: the same training as one, and what happens when one of them dies."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from same_run import metrics
from tiny_run import TINY
from two_ranks import BothRanksInOne, trained

from r2d2fast.train.cli import exit_status
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods import METHODS
from r2d2fast.train.ranks import Ranks, resolve_device
from tests.data.small_photographs import write_class_folders

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LISTING_THREADS = Path(__file__).with_name("train_and_list_threads.py")


def start(*arguments: str | Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_on_two(*arguments: str | Path) -> subprocess.Popen:
    return start("-m", "r2d2fast.train", *TINY, *arguments)


def no_thread_of_gloo(output: str) -> bool:
    """Whether, at their ends, both processes had none, which could abort them."""
    ends = re.findall(r"rank \d ends with the threads (.*)", output)
    return len(ends) == 2 and "gloo" not in " ".join(ends)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output = process.communicate(timeout=180)[0]
    assert process.returncode == status, output
    return output


def children(process: subprocess.Popen) -> dict[int, int]:
    """The process number of each rank."""
    ranks = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                environment = (directory / "environ").read_bytes().decode()
                ranks[int(re.search(r"\0RANK=(\d)", environment)[1])] = int(directory.name)
        except (OSError, TypeError):
            continue
    return ranks


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run on two ranks that nothing has interrupted."""
    directory = tmp_path_factory.mktemp("two") / "run"
    output = finish(start(LISTING_THREADS, *TINY, "--run-dir", directory))
    assert no_thread_of_gloo(output), output
    return directory


def test_two_ranks_train_as_one_does_on_the_same_global_batches(tmp_path: Path) -> None:
    finish(start(Path(__file__).with_name("two_ranks.py"), tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    whole = trained(BothRanksInOne, Ranks(), ["--bn-groups=2"])
    assert ((first["pseudo_logits"] != 0).any(1) & (second["pseudo_logits"] != 0).any(1)).sum() == 0
    first["pseudo_logits"] += second.pop("pseudo_logits")
    for name, exact in whole.items():
        torch.testing.assert_close(
            first[name], exact, rtol=2e-3, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Ranks differ in nothing but running statistics, of which rank 0's count.
    for name, tensor in second.items():
        if "running" not in name:
            assert torch.equal(tensor, first[name]), name


@pytest.fixture(scope="module")
def methods_on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each method has trained, on either rank."""
    directory = tmp_path_factory.mktemp("methods")
    finish(start(Path(__file__).with_name("two_ranks.py"), directory, *METHODS))
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_two_ranks_of_which_both_have_the_same_network(method: str, methods_on_two: list[dict]):
    first, second = (rank[method] for rank in methods_on_two)
    assert first["losses"].isfinite().all()
    assert first["losses"][0] != first["losses"][-1]
    for name, tensor in second.items():
        if "running" not in name:
            assert torch.equal(tensor, first[name]), name


@pytest.mark.slow
def test_a_lost_rank_stops_the_run_within_seconds_and_it_resumes(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = train_on_two("--run-dir", directory, "--checkpoint-minutes=0.0001")
    wait_for(directory / "checkpoint", process)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    output = finish(process, status=1)
    assert time.monotonic() - killed < 30  # seconds on a free machine
    assert "rank 0: another of the 2 processes is gone" in output
    assert "--resume goes on from the last checkpoint" in output
    assert not (directory / "results.json").exists()
    finish(train_on_two("--run-dir", directory, "--resume"))
    assert metrics(directory) == metrics(finished)


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_the_same_on_every_rank(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", 40, 16, 16)
    (tmp_path / "images/unlabelled").mkdir()
    broken = [f"unlabelled/{number:02}.jpg" for number in range(6)]
    for name in broken:
        (tmp_path / "images" / name).write_bytes(b"")
    data = ["--dataset=folder", f"--data-dir={tmp_path / 'images'}", "--test-fraction=0", "--on-bad-image=skip"]
    short = ["--stages=1", "--stage1.epochs=1", "--stage1.batch=8", f"--run-dir={tmp_path / 'run'}", "--device=cpu"]
    finish(start("-m", "r2d2fast.train", *data, *short))
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["bad_images"] == len(broken)
    assert json.loads((tmp_path / "run/results.json").read_text())["bad_images"] == len(broken)
    with (tmp_path / "run/labels.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file) if row["origin"] == "bad image"] == broken


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_stops_all_ranks(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = start(LISTING_THREADS, *TINY, "--run-dir", directory)
    # The file is there before rank 1 hears signals; with the first epoch in it both ranks have trained.
    wait_for(directory / "metrics.jsonl", process)
    while not metrics(directory):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert no_thread_of_gloo(output), output
    assert (directory / "checkpoint").exists()
    finish(train_on_two("--run-dir", directory, "--resume"))
    assert metrics(directory) == metrics(finished)


@pytest.mark.slow
@pytest.mark.parametrize("saved_on", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(saved_on: int, finished: Path, tmp_path: Path, start_run) -> None:
    directory = tmp_path / "run"
    if saved_on == 2:
        shutil.copytree(finished, directory)
    else:
        start_run("--run-dir", directory).join()
    before = metrics(directory)
    # As if the run had been stopped in the last epoch.
    labels = rows_of_labels(directory)
    for name in ("results.json", "network.safetensors", "labels.csv"):
        (directory / name).unlink()
    shutil.rmtree(directory / "checkpoint")
    (directory / "checkpoint.previous").rename(directory / "checkpoint")
    if saved_on == 2:
        process = start_run("--run-dir", directory, "--resume")
        process.join()
        assert process.exitcode == 0
    else:
        assert "resumed after" in finish(train_on_two("--run-dir", directory, "--resume"))
    after = metrics(directory)
    assert len(after) == len(before)
    assert after[:-2] == before[:-2]
    assert abs(after[-1]["test_error"] - before[-1]["test_error"]) < 10
    # Written by two ranks, of which each has predicted a part, and by one.
    again = rows_of_labels(directory)
    assert [(name, origin) for name, _, _, origin in again] == [(name, origin) for name, _, _, origin in labels]
    assert sum(one[1] != other[1] for one, other in zip(labels, again, strict=True)) < len(labels) / 5
    assert {name: label for name, label, _, origin in again if origin == "given"} == {
        name: label for name, label, _, origin in labels if origin == "given"
    }


def rows_of_labels(directory: Path) -> list[list[str]]:
    with (directory / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_under_torchrun_a_rank_takes_its_own_device_of_which_there_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda:0: under torchrun each process takes its own"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for rank in ("0", "7"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match=r"8 processes and 4 GPUs on this machine; accepted: .* at most 4"):
            resolve_device("cuda")


@pytest.mark.slow
def test_an_error_of_any_rank_is_said_once(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    Path(f"{bank}.1-of-2").write_bytes(b"somebody's file")
    output = finish(train_on_two("--run-dir", tmp_path / "run", f"--bank-storage={bank}"), status=1)
    assert output.count(f"{bank}.1-of-2 has 15 bytes") == 1
    assert "is gone" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "local_rank", "said"), [(0, 0, True), (1, 1, False), (8, 0, True)])
def test_the_first_process_of_each_machine_says_what_is_wrong(
    rank: int, local_rank: int, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    def act() -> None:
        raise ConfigError("no data here")

    assert exit_status("program", act) == ConfigError.status
    assert capsys.readouterr().err == ("program: no data here\n" if said else "")
