"""``--dataset folder`` where all images are small: the recipe that is chosen, a whole run, and one without test images."""

import json

import pytest

from r2d2fast.report import cli as report
from r2d2fast.train import cli
from r2d2fast.train.cli import parse
from tests.data.small_photographs import write_class_folders

SHORT = [
    *("--stage1.epochs=1", "--stage1.cosine-epochs=1", "--stage1.batch=8", "--stage2.epochs=2", "--num-labels=10"),
    *(
        "--stage2.repredict-epochs=1",
        "--stage2.lrs=0.1,0.05",
        "--stage2.unlabelled-batch=8",
        "--stage2.labelled-batch=4",
    ),
    *("--stage3.epochs=1", "--stage3.batch=16"),
]


@pytest.fixture
def folder(tmp_path):
    """40 square images of 16 pixels, of two classes, without a part for tests."""
    write_class_folders(tmp_path / "images", 40, 16, 16)
    return ["--dataset=folder", f"--data-dir={tmp_path / 'images'}"]


def test_the_kind_of_images_decides_the_recipe_before_the_flags_are_read(folder, tmp_path):
    small = parse(folder)
    assert (small.dataset, small.backbone, small.translate) == ("folder", "conv4", 2)
    assert parse([*folder, "--backbone=convlarge"]).backbone == "convlarge"
    write_class_folders(tmp_path / "larger", 4, 65, 64)
    larger = parse(["--dataset=folder", f"--data-dir={tmp_path / 'larger'}"])
    assert (larger.dataset, larger.backbone, larger.translate) == ("folder", "resnet18", 0)


def test_a_dry_run_shows_the_kind_and_the_recipe(folder, capsys):
    assert cli.main([*folder, *SHORT, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Images: 32 of 3 x 16 x 16 to train on, kept on the device, 24576 bytes." in printed
    assert "│ --translate" in printed


def test_what_is_held_out_is_told_with_the_flag_that_changes_it(folder, tmp_path, capsys):
    assert cli.main([*folder, *SHORT, f"--run-dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "10 labelled samples, 22 unlabelled, 8 labelled ones held out to test on (--test-fraction" in printed
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["held_out"] == 8
    assert 0 <= results["test_error"] <= 100


def test_without_test_images_everything_works_and_there_is_no_test_error(folder, tmp_path, capsys):
    flags = [*folder, *SHORT, f"--run-dir={tmp_path / 'run'}", "--test-fraction=0"]
    assert cli.main([*flags, "--runs=2"]) == 0
    printed = capsys.readouterr().out
    assert "stage 3: no test error, as there are no test samples after 1 epoch;" in printed
    assert "10 labelled samples, 30 unlabelled, none to test on" in printed
    assert "test error in percent" not in printed
    runs = [tmp_path / "run" / name for name in ("run0", "run1")]
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        assert results["test_error"] is None
        assert [stage["test_error"] for stage in results["stages"]] == [None] * 3
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["test_error"] for row in rows] == [None] * 4
        assert all(row["pseudo_label_error"] is not None for row in rows[1:])
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*flags[:-2], f"--run-dir={runs[0]}", "--test-fraction=0", "--eval-only"]) == 0
    assert "no test error, as there are no test samples" in capsys.readouterr().out
    assert cli.main([*flags, "--dry-run"]) == 0
    assert report.main([str(tmp_path / "run"), f"--output={tmp_path / 'report.html'}"]) == 0
    assert "stage 2" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("flag", "status"), [("--image-size=8", 2), ("--resize=40", 2), ("--image-size=16", 0)])
def test_a_size_that_small_images_do_not_have_is_refused(folder, tmp_path, capsys, flag, status):
    assert cli.main([*folder, *SHORT, f"--run-dir={tmp_path / 'run'}", "--stages=1", flag]) == status
    assert ("are trained on as they are; leave the flag out" in capsys.readouterr().err) == bool(status)


def test_damaged_images_are_counted(folder, tmp_path, capsys):
    (tmp_path / "images/china/000.jpg").write_bytes(b"")
    flags = [*folder, *SHORT, f"--run-dir={tmp_path / 'run'}", "--stages=1", "--test-fraction=0"]
    assert cli.main(flags) == 2
    assert "china/000.jpg: not a readable image" in capsys.readouterr().err
    assert cli.main([*flags, "--on-bad-image=skip"]) == 0
    told = capsys.readouterr().out
    assert "1 image could not be read:\n  china/000.jpg: not a readable image (" in told
