"""Schedules of other lengths: what hangs on the epochs of a stage goes with them, and a run of one goes on."""

import json

import pytest

from r2d2fast.train import cli
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.recipes import flags
from r2d2fast.train.scaling import SCHEDULE, dropped

CIFAR10 = "--dataset=cifar10"
RATES = (0.12, 0.12, 0.08, 0.04, 0.004)


def schedule(*arguments):
    """The values of SCHEDULE, in its order."""
    return [value for name, value in flags(cli.parse(list(arguments))).items() if name in SCHEDULE]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [300, 350, 600, (300, 375, 450, 525), RATES, 50]),
        (["--schedule-scale=0.1"], [30, 35, 60, (30, 38, 45, 52), RATES, 5]),
        (["--stage1.epochs=6"], [6, 7, 600, (300, 375, 450, 525), RATES, 50]),
        # In proportion 3, 3.75, 4.5 and 5.25 of 6: before epoch 4 comes the later one.
        (["--stage2.epochs=6"], [300, 350, 6, (3, 4, 5), (0.12, 0.12, 0.04, 0.004), 50]),
        (["--stage2.epochs=2"], [300, 350, 2, (1,), (0.12, 0.004), 50]),
        (["--schedule-scale=0.001"], [1, 1, 1, (), (0.12,), 1]),
        # What is given stays as it is.
        (
            ["--schedule-scale=0.1", "--stage1.epochs=300", "--stage2.lrs=1,1,1,1,1"],
            [300, 350, 60, (30, 38, 45, 52), (1.0,) * 5, 5],
        ),
        (
            ["--stage1.epochs", "6", "--stage1.cosine_epochs", "9"],
            [6, 9, 600, (300, 375, 450, 525), RATES, 50],
        ),
        (["--stage2.epochs=2", "--stage2.repredict-epochs="], [300, 350, 2, (), RATES, 50]),
    ],
)
def test_a_schedule_in_proportion(arguments, expected):
    assert schedule(CIFAR10, *arguments) == expected


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_is_none(scale):
    with pytest.raises(ConfigError, match=r"--schedule-scale .*: must be above 0, and finite"):
        schedule("--schedule-scale", scale)


def test_repredictions_without_room_are_told_with_the_learning_rates_that_are_left():
    recipe = cli.parse([CIFAR10])
    for epochs, told in (
        (
            "2",
            "2 epochs of stage 2: there is room for 1 of 4 repredictions, before epoch 1; learning rates 0.12,0.004",
        ),
        (
            "1",
            "1 epoch of stage 2: there is room for 0 of 4 repredictions, so stage 2 is plain D2; learning rates 0.12",
        ),
    ):
        assert dropped(recipe, cli.parse([CIFAR10, "--stage2.epochs", epochs])) == told
    for arguments in (
        [],
        ["--schedule-scale=0.1"],
        ["--stage2.repredict-epochs=7"],
        ["--stage2.epochs=2", "--stages=1"],
    ):
        assert dropped(recipe, cli.parse([CIFAR10, *arguments])) is None


def test_a_scaled_run_goes_on_with_the_same_flags_with_none_and_not_with_others(tmp_path, capsys):
    flags_given = ["--schedule-scale=0.01", "--stages=1,2", f"--run-dir={tmp_path / 'run'}"]
    assert cli.main(flags_given) == 0
    held = json.loads((tmp_path / "run/config.json").read_text())
    assert [held[name] for name in SCHEDULE] == [2, 2, 1, [], [0.12], 1]
    assert "schedule_scale" not in held
    for again in (flags_given, flags_given[1:], [*flags_given[1:], "--stage1.epochs=2"]):
        assert cli.main([*again, "--resume"]) == 0
        assert "holds a finished run" in capsys.readouterr().out
    assert cli.main(["--schedule-scale=0.02", *flags_given[1:], "--resume"]) == 2
    assert "stage1.epochs is 2 there, 4 asked for" in capsys.readouterr().err
