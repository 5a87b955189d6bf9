import os
import pickle
import resource

import pytest
import torch

from r2d2fast.train.checkpoint import CURRENT, PREVIOUS, load_checkpoint, save_checkpoint
from r2d2fast.train.errors import TrainingError


def state(number):
    return {"number": number, "tensor": torch.full((100,), float(number)), "rows": [{"error": 0.1 * number}]}


def assert_loads(directory, number):
    loaded, messages = load_checkpoint(directory)
    assert loaded["number"] == number
    assert torch.equal(loaded["tensor"], torch.full((100,), float(number)))
    assert loaded["rows"] == [{"error": 0.1 * number}]
    return messages


@pytest.fixture
def directory(tmp_path):
    """Holds checkpoints 1 and 2."""
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    return tmp_path


def test_no_checkpoint_yet(tmp_path):
    assert load_checkpoint(tmp_path) == (None, [])


def test_the_newest_is_loaded_and_the_one_before_is_kept(directory):
    assert assert_loads(directory, 2) == []
    (directory / CURRENT).unlink()
    assert_loads(directory, 1)


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 500, -1000, -1])
def test_a_truncated_checkpoint_is_detected_and_the_one_before_it_used(directory, kept):
    path = directory / CURRENT
    path.write_bytes(path.read_bytes()[:kept])
    messages = assert_loads(directory, 1)
    assert str(path) in messages[0]
    assert "damaged" in messages[0]
    assert messages[1] == f"going on from the one before it, {PREVIOUS}, renamed to {CURRENT}"
    assert os.listdir(directory) == [CURRENT]
    assert assert_loads(directory, 1) == []


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_it_used(directory):
    # Reading /proc/self/mem from its start fails as from a broken disk.
    (directory / CURRENT).unlink()
    (directory / CURRENT).symlink_to("/proc/self/mem")
    messages = assert_loads(directory, 1)
    assert messages[0] == f"the checkpoint {directory / CURRENT} cannot be read: Input/output error"
    assert PREVIOUS in messages[1]
    assert assert_loads(directory, 1) == []


def test_a_bad_checkpoint_whose_name_cannot_be_taken_is_an_error_of_ours(directory):
    (directory / CURRENT).unlink()
    (directory / CURRENT).mkdir()
    with pytest.raises(TrainingError, match=rf"cannot write {directory / CURRENT}: Is a directory"):
        load_checkpoint(directory)
    assert (directory / PREVIOUS).exists()


def test_a_damaged_checkpoint_with_none_before_it_is_never_taken_for_a_new_run(directory):
    (directory / PREVIOUS).unlink()
    (directory / CURRENT).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=rf"{CURRENT} is damaged: 7 bytes.*restore one, or remove {directory}"):
        load_checkpoint(directory)
    assert (directory / CURRENT).read_bytes() == b"damaged"


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_one_flipped_bit_is_detected(directory, place):
    path = directory / CURRENT
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert_loads(directory, 1)


def test_after_a_damaged_checkpoint_the_good_one_is_never_the_only_one_overwritten(directory):
    (directory / CURRENT).write_bytes(b"damaged")
    assert_loads(directory, 1)
    save_checkpoint(directory, state(3))
    (directory / CURRENT).write_bytes(b"damaged")
    assert_loads(directory, 1)


def test_with_no_good_checkpoint_left_the_message_says_what_to_do(directory):
    for name in (CURRENT, PREVIOUS):
        (directory / name).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=rf"{CURRENT} is damaged.*{PREVIOUS} is damaged.*remove {directory}"):
        load_checkpoint(directory)


def test_a_full_disk_leaves_the_checkpoints_as_they_were(directory):
    # Writes to /dev/full fail as on a full disk.
    (directory / (CURRENT + ".tmp")).symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=rf"cannot write {directory / CURRENT}: No space left on device.*--resume"):
        save_checkpoint(directory, state(3))
    assert sorted(os.listdir(directory)) == [PREVIOUS, CURRENT]
    assert_loads(directory, 2)
    save_checkpoint(directory, state(3))
    assert_loads(directory, 3)


def test_a_file_cut_short_by_a_limit_leaves_the_checkpoints_as_they_were(directory):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*File too large"):
            save_checkpoint(directory, state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_loads(directory, 2)


def test_the_content_is_on_the_disk_before_it_takes_the_name(directory, monkeypatch):
    calls = []

    def record(name):
        original = getattr(os, name)

        def recorded(*arguments):
            calls.append((name, *(os.path.basename(a) for a in arguments if isinstance(a, os.PathLike))))
            return original(*arguments)

        monkeypatch.setattr(os, name, recorded)

    record("fsync")
    record("replace")
    save_checkpoint(directory, state(3))
    temporary = CURRENT + ".tmp"
    assert calls == [("fsync",), ("replace", CURRENT, PREVIOUS), ("replace", temporary, CURRENT), ("fsync",)]


class Foreign:
    pass


def test_only_plain_values_and_tensors_are_ever_unpickled(directory):
    save_checkpoint(directory, {"foreign": Foreign()})
    with pytest.raises(pickle.UnpicklingError, match="Foreign"):
        load_checkpoint(directory)
