"""The plan that --dry-run prints, its figures against hand-made ones, and that it leaves everything as it was."""

import io
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from r2d2fast.train import cli, dry_run, measure
from r2d2fast.train.dry_run import print_plan
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import RECIPES
from tests.data.small_photographs import write_tree
from tests.train.small_data import CONFIG, make_trainer

DIGITS = RECIPES["digits"].config
# 50 labelled digits make 2 batches, 1387 unlabelled ones 14, all 1437 together 12.
PLANNED = replace(
    DIGITS,
    split=0,
    device="cpu",
    dry_run=True,
    stage1=replace(DIGITS.stage1, epochs=3, cosine_epochs=4),
    stage2=replace(DIGITS.stage2, epochs=4, repredict_epochs=(2,), lrs=(0.12, 0.05)),
    stage3=replace(DIGITS.stage3, epochs=2),
)


def plan(config=PLANNED, width=200):
    """What is printed, each line's words apart by one space, without the tables' borders."""
    file = io.StringIO()
    print_plan(config, Ranks(), Console(file=file, width=width))
    lines = [re.sub(r"[│┃\s]+", " ", line).strip() for line in file.getvalue().splitlines()]
    return [line for line in lines if re.search(r"\w", line)]


@pytest.fixture
def quick(monkeypatch):
    """Half a second for a step, 10 ms for an image evaluated, and none to measure it."""
    monkeypatch.setattr(measure, "_seconds_per_step", lambda trainer, epoch: 0.5)
    monkeypatch.setattr(measure, "_seconds_per_image", lambda trainer, count: 0.01)
    monkeypatch.setattr(measure, "_seconds_per_sample", lambda trainer: 0.0)


@pytest.mark.usefixtures("quick")
def test_settings_are_shown_with_where_they_are_from():
    lines = plan(replace(PLANNED, alpha=0.2, seed=7))
    for line in (
        "--alpha 0.2 command line",
        "--seed 7 command line",
        "--stage1.epochs 3 command line",
        "--stage2.repredict-epochs 2 command line",
        "--stage2.lrs 0.12,0.05 command line",
        "--beta 0.03 paper",
        "--label-scale 10.0 reference implementation",
        "--weight-decay 0.001 ours",
        "--stage3.hard-labels repredict reference implementation",
    ):
        assert line in lines
    shown = [line.split()[0] for line in lines if line.startswith("--")]
    assert len(set(shown)) == len(shown)
    assert set(shown) >= {"--" + name.replace("_", "-") for name in RECIPES["digits"].sources}
    assert not {"--dry-run", "--split", "--dataset"} & set(shown)


@pytest.mark.usefixtures("quick")
def test_adamw_has_learning_rates_of_its_own():
    lines = plan(replace(cli.parse(["--optimizer=adamw", "--ema=0.99"]), device="cpu"))
    for line in (
        "--optimizer adamw command line",
        "--ema 0.99 command line",
        "--stage1.lr 0.001 ours",
        "--stage2.lrs 0.0024,0.0024,0.0016,0.0008,8e-05 ours",
        "--weight-decay 1.0 ours",
        "--stage2.weight-decay None ours",
        "Network: 24058 parameters, 96232 bytes; as much again for gradients, and twice as much for AdamW's moments, and once "
        "more for averaged weights.",
    ):
        assert line in lines


@pytest.mark.usefixtures("quick")
def test_the_dry_run_shows_what_is_scaled():
    lines = plan(cli.parse(["--device=cpu", "--schedule-scale=0.05", "--stage2.epochs=3"]))
    for line in (
        "--schedule-scale 0.05 command line",
        "--stage1.epochs 10 scaled",
        "--stage1.cosine-epochs 10 scaled",
        "--stage2.epochs 3 command line",
        "--stage2.repredict-epochs 2 scaled",
        "--stage2.lrs 0.12,0.004 scaled",
        "--stage3.epochs 1 scaled",
    ):
        assert line in lines


@pytest.mark.usefixtures("quick")
def test_the_schedule_has_a_line_for_each_prediction_and_learning_rate():
    lines = plan()
    start = lines.index("digits, 50 labelled samples, 1387 unlabelled")
    assert lines[start + 1] == "stage epochs before the first steps an epoch batch learning rate"
    # The last step of stage 1: t = 2.5 of 4 epochs, 0.05 · ½(1 + cos(5π/8)); of stage 3: t = 1 + 11/12 of 2.
    assert lines[start + 2 : start + 6] == [
        "1 0-2 2 25 0.05 to 0.015, cosine",
        "2 0-1 predict 14 96 + 32 0.12",
        "2 2-3 repredict 14 96 + 32 0.05",
        "3 0-1 predict 12 128 0.01 to 4.3e-05, cosine",
    ]
    # A reprediction at the same learning rate, and a stage without prediction, have lines of their own.
    two, three = replace(PLANNED.stage2, lrs=(0.12, 0.12)), replace(PLANNED.stage3, hard_labels="pseudo")
    assert plan(replace(PLANNED, stage2=two, stage3=three))[start + 3 : start + 6] == [
        "2 0-1 predict 14 96 + 32 0.12",
        "2 2-3 repredict 14 96 + 32 0.12",
        "3 0-1 12 128 0.01 to 4.3e-05, cosine",
    ]
    # So has each cosine of stage 2, with a prediction or without.
    two = replace(PLANNED.stage2, lrs=(0.12, 0.12), lr_schedule="cosine", repredict=False)
    assert plan(replace(PLANNED, stage2=two))[start + 3 : start + 5] == [
        "2 0-1 predict 14 96 + 32 0.12 to 0.00038, cosine",
        "2 2-3 14 96 + 32 0.12 to 0.00038, cosine",
    ]
    file = io.StringIO()
    print_plan(replace(PLANNED, stage2=DIGITS.stage2), Ranks(), Console(file=file, width=60))
    assert "…" not in file.getvalue()  # nothing is cut in a narrow terminal


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_memory_of_network_and_bank_and_the_time_of_steps_predictions_and_evaluations():
    lines = plan()
    # Convolutions 144, 4608 and 18 432, their batch norms 32, 64 and 128, the classifier 640 and 10; four bytes each.
    assert "Network: 24058 parameters, 96232 bytes; as much again for gradients, and for momentum." in lines
    assert "Bank: 1387 x 10 pseudo-logits, 55480 bytes on this rank." in lines
    # Stage 1: 6 steps, 360 test images. Stage 2: 56 steps, 4 · 360, two predictions of 1387. Stage 3: 24, 2 · 360, one.
    assert lines[-4:] == [
        "Stage 1: 500 ms a step, about 7 s.",
        "Stage 2: 500 ms a step, about 70 s.",
        "Stage 3: 500 ms a step, about 33 s.",
        "9 epochs, 86 steps, about 110 s in all.",
    ]
    narrow = plan(replace(PLANNED, bank_dtype="bfloat16"))
    assert "Bank: 1387 x 10 pseudo-logits, 27740 bytes on this rank." in narrow


# Of an 8×8 image, in the small network: image; convolution, activation (in place of batch norm's output), pooled; three times.
KEPT = 4 * (64 + 2 * 16 * 64 + 16 * 16 + 2 * 32 * 16 + 32 * 4 + 2 * 64 * 4 + 64)
# And the places of the maxima, int64.
KEPT_PLACES = 8 * (16 * 16 + 32 * 4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("stages", "images"), [((1,), 25), ((1, 2), 128), ((1, 2, 3), 300)])
def test_activations_are_shown_of_the_largest_batch_of_the_stages_that_run(stages, images):
    (line,) = (
        line
        for line in plan(replace(PLANNED, stages=stages, stage3=replace(PLANNED.stage3, batch=300)))
        if line.startswith("Activations")
    )
    size = (KEPT + KEPT_PLACES) * images / 2**20
    assert line == f"Activations: about {size:.1f} MiB for the {images} images of a batch on each rank."


def test_activations_are_what_the_network_keeps_of_an_image_also_in_groups_of_batch_norm_and_in_16_bits():
    plain, grouped, half = (
        dry_run._activation_bytes(make_trainer(replace(CONFIG, **changes)))
        for changes in ({}, {"bn_groups": 4}, {"precision": "bfloat16"})
    )
    assert plain == pytest.approx(KEPT + KEPT_PLACES, rel=0.01)
    assert grouped == pytest.approx(plain, rel=0.02)
    assert KEPT / 2 + KEPT_PLACES <= half < 0.8 * plain


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_parameters_and_their_copies_under_autocast_are_no_activations(precision, monkeypatch):
    """The images, 64 numbers, and 1000 hidden ones, beside two layers of 64 000 and 4000 weights."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 4))
    monkeypatch.setattr("r2d2fast.train.build.make_model", lambda *_, **options: network)
    kept = dry_run._activation_bytes(make_trainer(replace(CONFIG, precision=precision)))
    size = 4 if precision == "float32" else 2
    assert kept == size * (64 + 1000)


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(1,), (1, 2, 3)])
def test_a_plan_is_of_the_stages_that_run_with_times_that_were_measured(stages):
    lines = plan(replace(PLANNED, stages=stages))
    times = [line for line in lines if line.startswith("Stage ")]
    assert [int(line[6]) for line in times] == list(stages)
    assert all(float(re.search(r": ([\d.e+]+) ms a step, about \d+ (s|min)", line)[1]) > 0 for line in times)
    assert {line[0] for line in lines if re.match(r"\d \d+-\d+ ", line)} == {str(stage) for stage in stages}
    assert re.fullmatch(r"\d epochs, \d+ steps, about \d+ (s|min) in all\.", lines[-1])


def test_a_step_is_the_median_of_a_few_and_an_image_its_part_of_a_batch_both_after_a_slow_first(monkeypatch):
    trainer = make_trainer()
    step, forward = trainer.step, trainer.model.forward
    naps = iter([0.5, 0.04, 0.04, 0.3])

    def slow(function):
        return lambda *arguments: (time.sleep(next(naps)), function(*arguments))[1]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", slow(step))
        assert 0.04 < measure._seconds_per_step(trainer, trainer.schedule[2]) < 0.25
    assert next(naps, None) is None
    naps = iter([0.5, 0.04])
    monkeypatch.setattr(trainer.model, "forward", slow(forward))
    assert 0.04 < 40 * measure._seconds_per_image(trainer, 512) < 0.4


def test_where_steps_are_slow_on_a_cpu_one_of_few_samples_is_measured(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(measure, "_seconds_per_step", lambda *_: pytest.fail("a whole step"))
    monkeypatch.setattr(
        trainer.model, "forward", lambda images, own=trainer.model.forward: (time.sleep(0.2), own(images))[1]
    )
    speed = measure.measure_speed(trainer)
    # 0.2 s for four samples, in batches of 4, 29 and 40.
    assert speed.steps == pytest.approx({1: 0.2, 2: 29 * 0.05, 3: 2.0}, rel=0.4)
    assert speed.image == pytest.approx(0.05, rel=0.4)


def test_photographs_that_take_a_cpu_long_have_commands_that_take_less(tmp_path, monkeypatch):
    """0.05 s for an image, 100 s for a step of one by ResNet-18, and 10 s by the small network."""
    photographs = write_tree(tmp_path / "my photographs", 6, 2)
    monkeypatch.setattr(measure, "_seconds_per_image", lambda trainer, count: 0.05)
    slow = {"resnet18": 100.0, "small": 10.0}
    monkeypatch.setattr(measure, "_seconds_per_sample", lambda trainer: slow[trainer.config.backbone])
    flags = ["--dataset=folder", f"--data-dir={photographs}", "--device=cpu", "--stages=1", "--on-bad-image=skip"]
    lines = plan(cli.parse(flags))
    commands = [shlex.split(line) for line in lines if line.startswith("python -m")]
    embed, embeddings, small = (cli_and_words[3:] for cli_and_words in commands)
    dest, skip = f"{photographs}-embeddings", ["--on-bad-image", "skip"]
    assert embed == [str(photographs), dest, "--backbone", "torchvision:resnet18", *skip]
    assert "about 0 s, and a classifier" in " ".join(lines)
    assert embeddings == ["--dataset", "embeddings", "--data-dir", dest]
    # 100 epochs of one step of six images: 6000 s, of which half fit in an hour.
    config = cli.parse(small)
    assert (config.backbone, config.image_size, config.stages, config.on_bad_image) == ("small", 64, (1,), "skip")
    assert (config.stage1.epochs, config.stage1.cosine_epochs) == (50, 50)
    assert config.run_dir == Path("runs/my photographs-small")
    assert "A small network on images of 64 pixels, about 50 min:" in lines
    assert not [line for line in plan(cli.parse([*flags, "--stage1.epochs=2"])) if line.startswith("python -m")]


def test_durations():
    seconds = (0.4, 119.4, 120.0, 7140.0, 7200.0, 9000.0)
    assert [measure.duration(one) for one in seconds] == ["0 s", "119 s", "2 min", "119 min", "2 h 0 min", "2 h 30 min"]


# --- nothing is left behind -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_nothing_is_written_and_the_bank_s_file_of_a_run_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bank"
    flags = {"run_dir": tmp_path / "run", "data_dir": tmp_path / "data", "tracker": "tensorboard", "profile": True}
    assert "--bank-storage" in " ".join(plan(replace(PLANNED, bank_storage=str(path), **flags)))
    assert list(tmp_path.rglob("*")) == []
    path.write_bytes(contents := torch.randn(1387 * 10).numpy().tobytes())
    plan(replace(PLANNED, bank_storage=str(path)))
    assert path.read_bytes() == contents
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_run_has_no_plan():
    with pytest.raises(ConfigError, match=r"--stage2.lrs 0.1: 1 learning rates, 1 repredictions"):
        plan(replace(PLANNED, stage2=replace(PLANNED.stage2, lrs=(0.1,))))
    with pytest.raises(ConfigError, match=r"--bank-storage /no/such/place: cannot make the bank file"):
        plan(replace(PLANNED, bank_storage="/no/such/place"))
