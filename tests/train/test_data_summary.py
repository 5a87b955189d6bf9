"""What a run says first: what it trains on."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from r2d2fast.train.data_summary import print_data
from tests.train.small_data import CONFIG, dataset, labels_of_split


def told(config=CONFIG, data=None, labels=None):
    file = io.StringIO()
    print_data(config, data or dataset(), labels_of_split() if labels is None else labels, Console(file=file, width=80))
    return file.getvalue().splitlines()


def test_classes_labels_and_tests():
    assert told() == [
        "4 classes, 2 labelled samples of each",
        "8 labelled samples, 112 unlabelled, 40 to test on",
    ]


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (3, "3 classes, labelled samples: class 0 2, class 1 3, class 2 1"),
        (40, "40 classes, labelled samples of each: 0 (class 3) to 3 (class 1)"),
    ],
)
def test_classes_with_different_numbers_of_labels(classes, line):
    labels = torch.full((120,), -1)
    labels[:6] = torch.tensor([0, 0, 1, 1, 1, 2])
    assert told(data=dataset(classes), labels=labels)[0] == line


def test_of_a_folder_what_is_left_out_and_what_may_be_a_mistake():
    folder = replace(dataset(), held_out=40, ignored={".heic": 2, ".gif": 1}, warnings=["[red] is a class"])
    config = replace(CONFIG, stage2=replace(CONFIG.stage2, epochs=1, repredict_epochs=(), lrs=(0.12,)))
    assert told(config, folder)[1:] == [
        "8 labelled samples, 112 unlabelled, 40 labelled ones held out to test on (--test-fraction changes how many)",
        "files that are ignored: 1 .gif, 2 .heic; read are .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp",
        "warning: [red] is a class",
        "1 epoch of stage 2: there is room for 0 of 4 repredictions, so stage 2 is plain D2; learning rates 0.12",
    ]
    assert "no file is ignored" in told(data=replace(folder, ignored={}))
    empty = replace(dataset(), test_labels=torch.empty(0, dtype=torch.int64))
    assert told(data=empty)[1].endswith("112 unlabelled, none to test on")


def test_on_a_terminal_lines_end_between_words():
    file = io.StringIO()
    folder = replace(dataset(), ignored={".heic": 2}, warnings=["word " * 40])
    print_data(CONFIG, folder, labels_of_split(), Console(file=file, width=30, force_terminal=True, color_system=None))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 30
    assert {word for line in lines for word in line.split() if "wor" in word} == {"word"}
