"""Split files: ``name class`` lines, written and read; every bad line named by its number."""

import errno
import os
from pathlib import Path

import pytest
import torch

from r2d2fast.data.errors import DataError
from r2d2fast.data.split import split_labels
from r2d2fast.data.split_files import read_split, write_split

CLASSES = ["cat", "dog", "T-shirt/top", "Ankle boot"]
NAMES = ["cat/1.jpg", "dog/my photo.jpg", " leading and trailing ", "ünïcode.png", "4", "5"]
LABELS = torch.tensor([0, 1, 3, -1, 2, -1])


def read(tmp_path, text, class_names=CLASSES):
    path = tmp_path / "split.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_split(path, NAMES, class_names)


def test_a_line_for_each_labelled_sample(tmp_path):
    write_split(tmp_path / "split.txt", NAMES, LABELS, CLASSES)
    assert (tmp_path / "split.txt").read_text() == (
        "cat/1.jpg cat\ndog/my photo.jpg dog\n leading and trailing  3\n4 T-shirt/top\n"
    )


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "new" / "folders" / "split.txt"
    write_split(path, NAMES, LABELS, CLASSES)
    labels = read_split(path, NAMES, CLASSES)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)


def test_a_drawn_split_is_written_over_an_old_file_and_read(tmp_path):
    targets = torch.arange(3000) % 10
    labels = split_labels(targets, 10, 200, split=4)
    names, classes = [str(number) for number in range(3000)], list("0123456789")
    path = tmp_path / "split.txt"
    path.write_text("old\n" * 10_000)
    write_split(path, names, labels, classes)
    assert torch.equal(read_split(path, names, classes), labels)
    assert os.listdir(tmp_path) == ["split.txt"]


def test_classes_by_name_or_number_in_any_order_with_empty_lines_and_windows_line_ends(tmp_path):
    labels = read(tmp_path, "5 cat\r\n\r\n4 2\r\n  \ncat/1.jpg 3\ndog/my photo.jpg dog")
    assert labels.tolist() == [3, 1, -1, -1, 2, 0]


def test_a_class_whose_name_is_a_number_counts_by_its_name(tmp_path):
    classes = ["3", "2", "one"]
    assert read(tmp_path, "4 3\n5 2\ncat/1.jpg 0\nünïcode.png 1", classes).tolist() == [0, -1, -1, 1, 0, 1]


def test_names_that_are_not_utf_8(tmp_path):
    names = [os.fsdecode(b"gr\xfcn.jpg"), "b"]
    write_split(tmp_path / "split.txt", names, torch.tensor([1, -1]), CLASSES)
    assert (tmp_path / "split.txt").read_bytes() == b"gr\xfcn.jpg dog\n"
    assert read_split(tmp_path / "split.txt", names, CLASSES).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("6 cat", r"line 3: the data set has no training sample '6'; its names are like 'cat/1.jpg'"),
        ("CAT/1.jpg cat", r"line 3: the data set has no training sample 'CAT/1.jpg'"),
        (
            "cat/1.jpg horse",
            r"line 3: 'horse' is no class; accepted: 0 to 3, or a name: cat, dog, T-shirt/top, Ankle boot",
        ),
        ("cat/1.jpg 4", r"line 3: '4' is no class; accepted: 0 to 3"),
        ("cat/1.jpg -1", r"line 3: '-1' is no class"),
        ("4 cat", r"line 3: '4' is in line 1 already; name each sample once"),
        ("cat/1.jpg", r"line 3: 'cat/1.jpg' is not a sample's name, a space and a class"),
        (" cat", r"line 3: ' cat' is not a sample's name, a space and a class"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"split\.txt, {message}"):
        read(tmp_path, f"4 cat\n\n{line}\n5 dog\n")


def test_not_every_class_of_a_thousand_is_listed(tmp_path):
    with pytest.raises(DataError) as raised:
        read(tmp_path, "4 x", [f"class{number}" for number in range(1000)])
    assert str(raised.value).endswith(
        "accepted: 0 to 999, or a name: " + ", ".join(f"class{n}" for n in range(10)) + ", …"
    )


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_that_labels_nothing_is_refused(tmp_path, text):
    with pytest.raises(DataError, match="labels no sample"):
        read(tmp_path, text)


def test_a_binary_file_is_refused_by_its_first_line(tmp_path):
    with pytest.raises(DataError, match="line 1"):
        read(tmp_path, bytes(range(128, 256)) + b" \xff\n")


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=rf"cannot read the split file {path}: (No such file|Is a directory)"):
            read_split(path, NAMES, CLASSES)


@pytest.mark.parametrize("name", ["two\nlines", "", "  ", "carriage\rreturn"])
def test_a_name_that_is_no_line_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"sample 1 is called .* no line of a split file"):
        write_split(tmp_path / "split.txt", ["a", name], torch.tensor([0, 0]), CLASSES)
    assert os.listdir(tmp_path) == []


def test_a_class_that_would_be_read_as_another_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"class 0 is called 'a b'.*its number is the name of class 1"):
        write_split(tmp_path / "split.txt", ["x"], torch.tensor([0]), ["a b", "0"])


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "split.txt"
    path.write_text("4 cat\n")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=rf"cannot write {path}: No space left on device; free some space"):
        write_split(path, NAMES, LABELS, CLASSES)
    assert path.read_text() == "4 cat\n"
    assert os.listdir(tmp_path) == ["split.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    Path(tmp_path, "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*split\.txt: (Not a directory|File exists)"):
        write_split(tmp_path / "file" / "split.txt", NAMES, LABELS, CLASSES)
