import errno
import json
import os
import shutil
import signal

import pytest
import torch
from tiny_run import keep_good_killed_at_write, save, save_killed_at_write, tensors, values

from r2d2fast.train.checkpoint import (
    CURRENT,
    MANIFEST,
    PREVIOUS,
    TEMPORARY,
    VALUES,
    find_checkpoint,
    keep_good,
    load_tensors,
    read_values,
    save_checkpoint,
)
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.ranks import Ranks
from tests.limits import file_size_limit

FILES = [".metadata", "__0_0.distcp", MANIFEST, VALUES]


def assert_finds(directory, number):
    path, messages = find_checkpoint(directory)
    assert read_values(path) == values(number)
    read, expected = tensors(0), tensors(number)
    load_tensors(path, read, Ranks())
    assert all(torch.equal(read["network"][name], expected["network"][name]) for name in ("weight", "count"))
    assert torch.equal(read["bank"], expected["bank"])
    return path, messages


def assert_goes_back(directory, *parts):
    """To checkpoint 1, with a message; going on from there keeps the bad one from becoming the one before."""
    path, messages = assert_finds(directory, 1)
    assert path == directory / PREVIOUS
    for part in (str(directory / CURRENT), *parts):
        assert part in messages[0]
    assert messages[1] == f"going on from the one before it, {PREVIOUS}"
    keep_good(path)
    assert os.listdir(directory) == [CURRENT]
    assert assert_finds(directory, 1) == (directory / CURRENT, [])


@pytest.fixture
def directory(tmp_path):
    """Holds checkpoints 1 and 2."""
    directory = tmp_path / "run"
    directory.mkdir()
    save(directory, 1)
    save(directory, 2)
    return directory


def test_the_newest_is_found_and_the_one_before_is_kept(directory, tmp_path):
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "nowhere") == (None, [])
    assert sorted(os.listdir(directory)) == [CURRENT, PREVIOUS]
    assert sorted(os.listdir(directory / CURRENT)) == FILES
    assert assert_finds(directory, 2) == (directory / CURRENT, [])
    keep_good(directory / CURRENT)
    assert sorted(os.listdir(directory)) == [CURRENT, PREVIOUS]
    save(directory, 3)
    assert_finds(directory, 3)
    shutil.rmtree(directory / CURRENT)
    assert assert_finds(directory, 2) == (directory / PREVIOUS, [])


# --- damage


def flipped(content, place):
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_changed_or_missing_file_is_detected_and_the_checkpoint_before_used(directory, name, tmp_path):
    content = (directory / CURRENT / name).read_bytes()
    cuts = [content[:length] for length in (0, 1, len(content) // 2, -1)]
    changes = [flipped(content, place) for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)]
    others = [b"[]", b'"text"', b"1", b"\xff\xfe", b"{"] if name == MANIFEST else []
    for number, damaged in enumerate([*cuts, *changes, *others, None]):
        path = shutil.copytree(directory, tmp_path / f"copy{number}" / "run") / CURRENT / name
        if damaged is not None:
            path.write_bytes(damaged)
            assert_goes_back(path.parents[1])
            continue
        path.unlink()
        what = f"cannot be read: No such file or directory ({path})" if name == MANIFEST else "lacks"
        assert_goes_back(path.parents[1], what, name)


def test_a_file_that_the_disk_does_not_give_back_is_named(directory):
    # Reading /proc/self/mem from its start fails as from a broken disk.
    path = directory / CURRENT / "__0_0.distcp"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    assert_goes_back(directory, "cannot be read: Input/output error")


def test_a_bad_checkpoint_whose_name_cannot_be_taken_is_an_error_of_ours(directory):
    shutil.rmtree(directory / CURRENT)
    (directory / CURRENT).write_text("a file")
    path, messages = assert_finds(directory, 1)
    assert f"{directory / CURRENT} cannot be read: Not a directory" in messages[0]
    with pytest.raises(TrainingError, match=f"cannot write {directory / CURRENT}: Not a directory"):
        keep_good(path)
    assert_finds(directory, 1)


def test_with_no_good_checkpoint_left_nothing_is_taken_for_a_new_run_and_the_message_says_what_to_do(directory):
    for name in (CURRENT, PREVIOUS):
        (directory / name / MANIFEST).unlink()
    told = rf"{CURRENT} cannot be read.*{PREVIOUS} cannot be read.*remove {directory}"
    with pytest.raises(TrainingError, match=told):
        find_checkpoint(directory)
    shutil.rmtree(directory / PREVIOUS)
    with pytest.raises(TrainingError, match=rf"{CURRENT} cannot be read.*restore one, or remove {directory}"):
        find_checkpoint(directory)
    assert (directory / CURRENT / VALUES).exists()


def test_after_a_damaged_checkpoint_the_good_one_is_never_the_only_one_overwritten(directory):
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    keep_good(find_checkpoint(directory)[0])
    save(directory, 3)
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    assert_finds(directory, 1)


def test_a_checkpoint_of_another_network_does_not_fit(directory, monkeypatch):
    path, _ = find_checkpoint(directory)
    for network in ({"weight": torch.zeros(99)}, {"bias": torch.zeros(1)}):
        with pytest.raises(TrainingError, match=f"the checkpoint {path} does not fit this run: "):
            load_tensors(path, {"network": network}, Ranks())

    def fail(*arguments, **options):
        raise EOFError  # an error of no words is named by its kind

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(TrainingError, match="does not fit this run: EOFError"):
        load_tensors(directory / CURRENT, tensors(0), Ranks())


# --- disks


def assert_as_it_was(directory, content):
    assert sorted(os.listdir(directory)) == [CURRENT, PREVIOUS]
    assert {path: path.read_bytes() for path in directory.glob("*/*")} == content


@pytest.mark.parametrize(
    ("limit", "tensor", "text", "named"),
    [
        (1000, 100, 1, f"{TEMPORARY}: "),  # the list of tensors, which PyTorch writes
        (100_000, 1_000_000, 1, f"{TEMPORARY}: "),  # the tensors
        (100_000, 100, 1_000_000, rf"{TEMPORARY}/{VALUES}: File too large"),
    ],
)
def test_files_cut_short_by_a_limit_leave_the_checkpoints_as_they_were(directory, limit, tensor, text, named):
    before = {path: path.read_bytes() for path in directory.glob("*/*")}
    refused = pytest.raises(TrainingError, match=f"cannot write {directory}/{named}.*--resume")
    with refused as error, file_size_limit(limit):
        save_checkpoint(directory, {"bank": torch.zeros(tensor)}, {"text": "x" * text}, Ranks())
    assert "ree some space" in str(error.value)
    assert "\n" not in str(error.value)
    assert_as_it_was(directory, before)


@pytest.mark.parametrize("good", [0, 1, 2, 3])
def test_a_disk_that_is_full_at_any_time_leaves_the_checkpoints_as_they_were(directory, monkeypatch, good):
    before = {path: path.read_bytes() for path in directory.glob("*/*")}
    synced = []

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isfile(path):
            synced.append(os.path.basename(path))
            if len(synced) > good:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=f"cannot write {directory}.*No space left on device.*--resume"):
        save(directory, 3)
    assert synced == ["__0_0.distcp", ".metadata.tmp", f"{VALUES}.tmp", f"{MANIFEST}.tmp"][: good + 1]
    assert_as_it_was(directory, before)
    monkeypatch.undo()
    save(directory, 3)
    assert_finds(directory, 3)


def test_what_a_killed_process_left_of_a_checkpoint_is_no_obstacle(directory):
    (directory / TEMPORARY / "sub").mkdir(parents=True)
    (directory / TEMPORARY / "__7_0.distcp").write_bytes(b"of another rank")
    assert_finds(directory, 2)
    save(directory, 3)
    assert_finds(directory, 3)
    assert sorted(os.listdir(directory / CURRENT)) == FILES
    (directory / TEMPORARY).write_text("a file")
    with pytest.raises(TrainingError, match=f"cannot write {directory / TEMPORARY}: File exists"):
        save(directory, 4)
    assert_finds(directory, 3)


def test_everything_is_on_the_disk_before_it_takes_the_name(directory, monkeypatch):
    calls = []

    def record(name):
        original = getattr(os, name)

        def recorded(*arguments, **options):
            paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else os.fspath(a) for a in arguments]
            calls.append((name, *(os.path.relpath(path, directory) for path in paths)))
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "replace", "rename"):
        record(name)
    save(directory, 3)
    moved = [calls.index(("replace", CURRENT, PREVIOUS)), calls.index(("replace", TEMPORARY, CURRENT))]
    assert moved[0] < moved[1]
    assert calls[moved[1] + 1 :] == [("fsync", ".")]
    before = calls[: moved[0]]
    for name in FILES:
        final = f"{TEMPORARY}/{name}"
        renames = [call for call in before if call[0] in ("replace", "rename") and call[-1] == final]
        written = renames[0][1] if renames else final
        assert before.index(("fsync", written)) < (before.index(renames[0]) if renames else len(before))
        # The directory is synced after the file has got its name in it.
        named = before.index(renames[0]) if renames else before.index(("fsync", written))
        assert ("fsync", TEMPORARY) in before[named:]


# --- death


def killed_at_operations(start_run, directory, tmp_path, every, target, *arguments):
    """Copies of ``directory`` in which ``target`` was killed before each (or each fifth) file operation; last, one that lived."""
    for count in range(1, 100, every):
        copy = shutil.copytree(directory, tmp_path / f"killed{count}" / "run")
        process = start_run(copy, *arguments, count, target=target)
        process.join()
        yield copy
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_before_any_file_operation_of_a_save_a_good_checkpoint_is_left(directory, start_run, tmp_path, every):
    *copies, whole = killed_at_operations(start_run, directory, tmp_path, every, save_killed_at_write, 3)
    # mkdir; tensors; list of tensors and its rename; values and manifest, opened and renamed; four files and a directory
    # removed; two renames.
    assert len(copies) >= 14 // every
    assert_finds(whole, 3)
    for copy in copies:
        path, messages = assert_finds(copy, 2)
        assert messages == []
        # The next process goes on from there.
        keep_good(path)
        save(copy, 4)
        assert_finds(copy, 4)
        assert sorted(os.listdir(copy)) == [CURRENT, PREVIOUS]
        shutil.rmtree(copy / CURRENT)
        assert_finds(copy, 2)


def test_killed_before_any_file_operation_of_going_back_the_good_checkpoint_is_left(directory, start_run, tmp_path):
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    *copies, whole = killed_at_operations(start_run, directory, tmp_path, 1, keep_good_killed_at_write)
    assert len(copies) == 4 + 1 + 1  # four files and a directory removed, a rename
    assert assert_finds(whole, 1) == (whole / CURRENT, [])
    for copy in copies:
        assert_finds(copy, 1)
        assert (copy / PREVIOUS).exists()


def test_values_are_exact(tmp_path):
    numbers = [0.1, 1e-300, 1.7976931348623157e308, 2**53 + 1, -0.0]
    save_checkpoint(tmp_path, tensors(1), {"numbers": numbers}, Ranks())
    assert json.dumps(read_values(tmp_path / CURRENT)["numbers"]) == json.dumps(numbers)
