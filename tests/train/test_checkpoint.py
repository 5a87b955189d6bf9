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
    read = tensors(0)
    load_tensors(path, read, Ranks())
    expected = tensors(number)
    assert torch.equal(read["network"]["weight"], expected["network"]["weight"])
    assert torch.equal(read["network"]["count"], expected["network"]["count"])
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


def test_no_checkpoint_yet(tmp_path):
    assert find_checkpoint(tmp_path) == (None, [])
    assert find_checkpoint(tmp_path / "nowhere") == (None, [])


def test_the_newest_is_found_and_the_one_before_is_kept(directory):
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


def cut(kept):
    return lambda content: content[: kept if isinstance(kept, int) else int(kept * len(content))]


def flipped(place):
    def flip(content):
        damaged = bytearray(content)
        damaged[int(place * len(content))] ^= 1
        return bytes(damaged)

    return flip


DAMAGES = [*map(cut, (0, 1, 0.5, -1)), *map(flipped, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)), None]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_changed_or_missing_file_is_detected_and_the_checkpoint_before_used(directory, name, tmp_path):
    for number, damage in enumerate(DAMAGES):
        copy = shutil.copytree(directory, tmp_path / f"copy{number}" / "run")
        path = copy / CURRENT / name
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))
            assert_goes_back(copy)
            continue
        path.unlink()
        what = f"cannot be read: No such file or directory ({path})" if name == MANIFEST else "lacks"
        assert_goes_back(copy, what, name)


@pytest.mark.parametrize("content", [b"", b"[]", b'"text"', b"1", b"\xff\xfe", b"{"])
def test_a_manifest_that_is_none_is_detected(directory, content):
    (directory / CURRENT / MANIFEST).write_bytes(content)
    assert_goes_back(directory, "is damaged: ", MANIFEST)


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


def test_a_damaged_checkpoint_with_none_before_it_is_never_taken_for_a_new_run(directory):
    shutil.rmtree(directory / PREVIOUS)
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=rf"{CURRENT} is damaged: {VALUES} do.*restore one, or remove {directory}"):
        find_checkpoint(directory)
    assert (directory / CURRENT / VALUES).read_bytes() == b"damaged"


def test_with_no_good_checkpoint_left_the_message_says_what_to_do(directory):
    for name in (CURRENT, PREVIOUS):
        (directory / name / MANIFEST).unlink()
    with pytest.raises(
        TrainingError, match=rf"{CURRENT} cannot be read.*{PREVIOUS} cannot be read.*remove {directory}"
    ):
        find_checkpoint(directory)


def test_after_a_damaged_checkpoint_the_good_one_is_never_the_only_one_overwritten(directory):
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    keep_good(find_checkpoint(directory)[0])
    save(directory, 3)
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    assert_finds(directory, 1)


def test_a_checkpoint_of_another_network_does_not_fit(directory):
    path, _ = find_checkpoint(directory)
    for network in ({"weight": torch.zeros(99)}, {"bias": torch.zeros(1)}):
        with pytest.raises(TrainingError, match=f"the checkpoint {path} does not fit this run: "):
            load_tensors(path, {"network": network}, Ranks())


def test_an_error_of_no_words_is_named_by_its_kind(directory, monkeypatch):
    def fail(*arguments, **options):
        raise EOFError

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


def test_a_name_that_is_taken_is_an_error_of_ours(directory):
    (directory / TEMPORARY).write_text("a file")
    with pytest.raises(TrainingError, match=f"cannot write {directory / TEMPORARY}: File exists"):
        save(directory, 3)
    assert_finds(directory, 2)


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


def killed(start_run, target, *arguments):
    """Runs ``target``; whether it was killed."""
    process = start_run(*arguments, target=target)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_before_any_file_operation_of_a_save_a_good_checkpoint_is_left(directory, start_run, tmp_path_factory):
    found = []
    for count in range(1, 100):
        copy = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(directory, copy)
        if not killed(start_run, save_killed_at_write, copy, 3, count):
            break
        path, messages = find_checkpoint(copy)
        assert messages == []
        found.append(read_values(path)["position"][1])
        assert_finds(copy, found[-1])
        # The next process goes on from there.
        keep_good(path)
        save(copy, 4)
        assert_finds(copy, 4)
        assert sorted(os.listdir(copy)) == [CURRENT, PREVIOUS]
        shutil.rmtree(copy / CURRENT)
        assert_finds(copy, found[-1])
    # mkdir; tensors; list of tensors and its rename; values and manifest, opened and renamed; four files and a directory
    # removed; two renames.
    assert len(found) >= 14
    assert set(found) == {2}
    assert_finds(copy, 3)


def test_killed_before_any_file_operation_of_going_back_the_good_checkpoint_is_left(
    directory, start_run, tmp_path_factory
):
    (directory / CURRENT / VALUES).write_bytes(b"damaged")
    for count in range(1, 100):
        copy = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(directory, copy)
        if not killed(start_run, keep_good_killed_at_write, copy, count):
            break
        assert_finds(copy, 1)
        assert (copy / PREVIOUS).exists()
    assert count - 1 == 4 + 1 + 1  # four files and a directory removed, a rename
    assert assert_finds(copy, 1) == (copy / CURRENT, [])


def test_values_are_exact(tmp_path):
    numbers = [0.1, 1e-300, 1.7976931348623157e308, 2**53 + 1, -0.0]
    save_checkpoint(tmp_path, tensors(1), {"numbers": numbers}, Ranks())
    assert json.dumps(read_values(tmp_path / CURRENT)["numbers"]) == json.dumps(numbers)
