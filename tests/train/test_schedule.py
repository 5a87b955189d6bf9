import math
from contextlib import nullcontext
from dataclasses import replace

import pytest

from r2d2fast.train.checks import check_schedule, check_values
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.schedule import make_schedule

DIGITS = RECIPES["digits"].config


def config(stages=(1, 2, 3), **changes):
    """A small schedule, with changes to its stages: ``config(stage1={"lr": 1})``."""
    values = {
        "stage1": {"epochs": 3, "batch": 20, "lr": 0.05, "cosine_epochs": 4},
        "stage2": {"epochs": 6, "unlabelled_batch": 96, "labelled_batch": 32, "repredict_epochs": (3, 4)}
        | {"lrs": (0.12, 0.12, 0.004)},
        "stage3": {"epochs": 2, "batch": 128, "lr": 0.01, "hard_labels": "repredict"},
    }
    made = {name: replace(getattr(DIGITS, name), **(own | changes.get(name, {}))) for name, own in values.items()}
    return replace(DIGITS, stages=stages, **made)


def check_all(config, labelled=50, unlabelled=1387, ranks=1):
    check_values(config, (1, 8, 8), ranks)
    check_schedule(config, labelled, unlabelled, ranks)


def test_epochs_steps_predictions_and_stage_ends_against_hand_made_values():
    schedule = make_schedule(config(), labelled=50, unlabelled=1387)
    assert [(e.stage, e.epoch, e.steps, e.predicts, e.repredicts, e.last) for e in schedule] == [
        (1, 0, 3, False, False, False),
        (1, 1, 3, False, False, False),
        (1, 2, 3, False, False, True),
        (2, 0, 14, True, False, False),
        (2, 1, 14, False, False, False),
        (2, 2, 14, False, False, False),
        (2, 3, 14, True, True, False),
        (2, 4, 14, True, True, False),
        (2, 5, 14, False, False, True),
        (3, 0, 12, True, False, False),
        (3, 1, 12, False, False, True),
    ]


def test_the_test_error_is_measured_after_as_many_images_as_it_takes_and_at_the_end_of_phases():
    def evaluated(test):
        schedule = make_schedule(config(), labelled=50, unlabelled=1387, test=test)
        return [(e.stage, e.epoch) for e in schedule if e.evaluates]

    ends = [(1, 2), (2, 2), (2, 3), (2, 5), (3, 1)]
    assert evaluated(50) == [(e.stage, e.epoch) for e in make_schedule(config(), 50, 1387)]
    assert evaluated(100) == sorted({*ends, (1, 1), (2, 0), (2, 1), (2, 4), (3, 0)})
    # An epoch of stage 2 has 14 batches of 128 images, the first of stage 3 as many images as there are.
    assert evaluated(3000) == sorted({*ends, (2, 1)})
    assert evaluated(1_000_000) == ends


@pytest.mark.parametrize("repredict", [True, False])
def test_the_learning_rate_falls_along_a_cosine_within_each_phase_of_stage_2(repredict):
    changes = {"lr_schedule": "cosine", "repredict": repredict, "lrs": (0.12, 0.08, 0.04)}
    schedule = make_schedule(config(stage2=changes), labelled=50, unlabelled=1387)
    # Phases of 3, 1 and 2 epochs of 14 steps.
    rates = [(e.lr(0), e.lr(7)) for e in schedule[3:9]]
    expected = [
        (0.12, 0.12 * math.cos(math.pi / 12) ** 2),
        (0.12 * math.cos(math.pi / 6) ** 2, 0.12 * 0.5),
        (0.12 * math.cos(math.pi / 3) ** 2, 0.12 * math.cos(math.pi * 5 / 12) ** 2),
        (0.08, 0.08 * 0.5),
        (0.04, 0.04 * math.cos(math.pi / 8) ** 2),
        (0.04 * 0.5, 0.04 * math.cos(math.pi * 3 / 8) ** 2),
    ]
    for found, hand_made in zip(rates, expected, strict=True):
        assert found == pytest.approx(hand_made)
    constant = make_schedule(config(stage2=changes | {"lr_schedule": "constant"}), labelled=50, unlabelled=1387)
    assert [e.lr(7) for e in constant[3:9]] == [0.12, 0.12, 0.12, 0.08, 0.04, 0.04]


def test_learning_rates_against_hand_computed_values():
    schedule = make_schedule(config(), labelled=50, unlabelled=1387)
    # Stage 1: 0.05 · ½(1 + cos(π t / 4)), t in fractional epochs, three steps to an epoch.
    assert schedule[0].lr(0) == pytest.approx(0.05)
    assert schedule[1].lr(0) == pytest.approx(0.05 * 0.8535533905932737)
    assert schedule[2].lr(0) == pytest.approx(0.025)
    assert schedule[2].lr(1) == pytest.approx(0.05 * 0.3705904774487396)
    assert [e.lr(0) for e in schedule[3:9]] == [0.12, 0.12, 0.12, 0.12, 0.004, 0.004]
    assert [e.lr(13) for e in schedule[3:9]] == [0.12, 0.12, 0.12, 0.12, 0.004, 0.004]
    assert [schedule[9].lr(0), schedule[10].lr(0)] == pytest.approx([0.01, 0.005])
    assert schedule[10].lr(6) == pytest.approx(0.01 * 0.14644660940672624)


def test_schedules_without_repredictions_without_a_prediction_of_stage_3_and_of_fewer_stages():
    schedule = make_schedule(config(stage3={"hard_labels": "pseudo"}), 50, 1387)
    assert [e.predicts for e in schedule if e.stage == 3] == [False, False]
    assert {e.stage for e in make_schedule(config(stages=(1,)), 50, 1387)} == {1}
    assert {e.stage for e in make_schedule(config(stages=(1, 2)), 50, 1387)} == {1, 2}
    plain = make_schedule(config(stage2={"repredict_epochs": (), "lrs": (0.1,)}), 50, 1387)
    assert not any(e.repredicts for e in plain)
    assert {e.lr(0) for e in plain if e.stage == 2} == {0.1}


def test_the_digits_recipe_repredicts_four_times_with_falling_learning_rates():
    schedule = [e for e in make_schedule(DIGITS, 50, 1387) if e.stage == 2]
    assert sum(e.repredicts for e in schedule) == 4
    lrs = [e.lr(0) for e in schedule]
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[0] > 10 * lrs[-1]


BAD = (-0.1, math.nan, math.inf, 1e39)
RATE = "must be at least 0, and finite"
STAGE_SIZES = {
    "stage1": ("epochs", "batch"),
    "stage2": ("epochs", "unlabelled-batch", "labelled-batch"),
    "stage3": ("epochs", "batch"),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (2, 3)}, r"--stages 2,3: accepted are 1, 1,2 and 1,2,3"),
        ({"stages": ()}, r"--stages : accepted are 1, 1,2 and 1,2,3"),
        ({"stages": (1, 4)}, r"--stages 1,4: accepted"),
        ({"stage3": {"batch": -1}}, r"--stage3.batch -1: must be at least 1"),
        ({"stage1": {"cosine_epochs": 2}}, r"--stage1.cosine-epochs 2: must be at least --stage1.epochs, 3"),
        ({"stage2": {"unlabelled_batch": 2000}}, r"--stage2.unlabelled-batch 2000: there are only 1387"),
        ({"stage2": {"repredict_epochs": (4, 3)}}, r"--stage2.repredict-epochs 4,3: must rise"),
        ({"stage2": {"repredict_epochs": (3, 3)}}, r"--stage2.repredict-epochs 3,3: must rise"),
        ({"stage2": {"repredict_epochs": (0, 3)}}, r"--stage2.repredict-epochs 0,3: .* between 1 and 5"),
        ({"stage2": {"repredict_epochs": (3, 6)}}, r"--stage2.repredict-epochs 3,6: .* between 1 and 5"),
        ({"stage1": {"batch": 1}}, r"--stage1.batch 1: must be at least 2, two for each process, for batch norm"),
        ({"stage3": {"batch": 1}}, r"--stage3.batch 1: must be at least 2, two for each process, for batch norm"),
        ({"stage2": {"lrs": (0.1, 0.1)}}, r"--stage2.lrs 0.1,0.1: 2 learning rates, 2 repredictions; needed are 3"),
        *(
            ({stage: {name.replace("-", "_"): 0}}, f"--{stage}.{name} 0: must be at least 1; leave .*--stages")
            for stage, names in STAGE_SIZES.items()
            for name in names
        ),
        *(
            ({stage: {"lr": v}}, rf"--{stage}.lr {v}: {RATE}".replace("+", r"\+"))
            for stage in ("stage1", "stage3")
            for v in BAD
        ),
        *(({"stage2": {"lrs": (0.1, v, 0.1)}}, rf"--stage2.lrs 0.1,{v},0.1: {RATE}".replace("+", r"\+")) for v in BAD),
    ],
)
def test_what_makes_no_schedule_is_refused_by_its_flag_and_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_all(config(**changes))


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        ((1,), {"stage2": {"unlabelled_batch": 2000}}),
        ((1,), {"stage2": {"epochs": 0, "unlabelled_batch": 0, "lrs": (0.1,)}, "stage3": {"epochs": 0, "batch": 0}}),
        ((1,), {"stage2": {"lrs": (-1.0,)}, "stage3": {"lr": float("nan")}}),
        ((1,), {"stage2": {"repredict_epochs": (4, 3)}}),
        ((1, 2), {"stage3": {"epochs": 0, "batch": 0, "lr": -1.0}}),
    ],
)
def test_a_stage_that_is_not_run_may_have_any_settings(stages, changes):
    check_all(config(stages, **changes))
    assert make_schedule(config(stages, **changes), 50, 1387) == make_schedule(config(stages), 50, 1387)


@pytest.mark.parametrize(
    ("name", "bad", "good", "accepted"),
    [
        ("alpha", BAD, (0.0, 1.0), "at least 0, and finite"),
        ("beta", BAD, (0.0, 1.0), "at least 0, and finite"),
        ("label_lr", BAD, (0.0, 4000.0), "at least 0, and finite"),
        ("weight_decay", BAD, (0.0, 3e38), "at least 0, and finite"),
        ("label_scale", (0.0, -1.0, math.nan, math.inf, 1e39), (1e-3, 10.0), "above 0, and finite"),
        ("momentum", (-0.1, 1.0, 1.5, math.nan, math.inf), (0.0, 0.99), "at least 0 and below 1"),
        ("ema", (-0.1, 1.0, math.nan), (0.0, 0.999), "at least 0 and below 1"),
        ("translate", (-1, 8, 100), (0, 7), "0 to 7 pixels"),
        ("cutout", (-1, -16), (0, 1, 100), "at least 0 pixels"),
        ("checkpoint_minutes", (0.0, -1.0, math.nan), (1e-3, math.inf), "above 0"),
        ("log_interval", (0, -1), (1, 1000), "at least 1\n"),  # and not "leave … out with --stages"
        ("bn_groups", (0, -1), (1, 4), "at least 1\n"),
        ("seed", (-1, 2**62, 2**64), (0, 2**62 - 1), "0 to 4611686018427387903"),
        ("split", (-1, 2**62, 2**64), (0, 2**62 - 1, None), "0 to 4611686018427387903"),
    ],
)
def test_the_range_of_a_value_ends_where_its_message_says(name, bad, good, accepted):
    for value in bad:
        message = f"--{name.replace('_', '-')} {value}: must be {accepted}"
        with pytest.raises(ConfigError) as error:
            check_all(replace(DIGITS, **{name: value}))
        assert message in f"{error.value}\n"
    for value in good:
        check_all(replace(DIGITS, **{name: value}))


# --- ranks and small data -------------------------------------------------------------------------------------------


def test_steps_with_several_ranks_against_hand_made_values():
    # Stage 1: 50 = 2 · 20 + 10, where 10 are two for each of five ranks, but not of six. Stage 2: the parts of 1387 are 278, and
    # 275 the last, in batches of 95 / 5 = 19. Stage 3: 1437 = 11 · 128 + 29.
    several = config(stage2={"unlabelled_batch": 95, "labelled_batch": 30})
    schedule = make_schedule(several, 50, 1387, 5)
    assert [{e.steps for e in schedule if e.stage == stage} for stage in (1, 2, 3)] == [{3}, {14}, {12}]
    # Of six ranks the parts are 232, the last one 227, in batches of 96 / 6 = 16.
    assert [{e.steps for e in make_schedule(config(), 50, 1387, 6) if e.stage == stage} for stage in (1, 2, 3)] == [
        {2},
        {14},
        {12},
    ]
    assert {e.steps for e in make_schedule(config(), 50, 1387, 16) if e.stage == 3} == {11}
    # Of 1346 samples, 14 batches of one rank, the last of six ranks has 1346 − 5 · 225 = 221: 13 of its 16 a batch.
    steps = [{e.steps for e in make_schedule(config(), 50, 1346, r) if e.stage == 2} for r in (1, 6)]
    assert steps == [{14}, {13}]


@pytest.mark.parametrize(
    ("stages", "samples", "ranks", "message"),
    [
        # What still fits, None, beside what does not.
        ((1, 2, 3), (50, 1387), 4, None),
        ((1, 2, 3), (50, 1387), 5, r"--stage2.unlabelled-batch 96: must be a multiple of the 5 processes, or run"),
        ((1, 2, 3), (50, 1387), 3, r"--stage2.labelled-batch 32: must be a multiple of the 3 processes"),
        ((1,), (50, 1387), 10, None),
        ((1,), (50, 1387), 11, r"--stage1.batch 20: must be at least 22, two for each process"),
        ((1,), (2, 1387), 1, None),
        ((1,), (1, 1387), 1, r"stage 1 has 1 samples, which make no batch: at least 2 are needed, two for"),
        ((1, 2, 3), (7, 1387), 4, r"stage 1 has 7 samples, which make no batch: at least 8 are needed"),
        # A batch has 24 of each rank; of 97 samples the last one has 97 − 3 · 25 = 22.
        ((1, 2, 3), (50, 96), 4, None),
        ((1, 2, 3), (50, 97), 4, r"-batch 96: .* only 97 unlabelled samples, dealt to 4 processes; take"),
        ((1, 2, 3), (1437, 0), 1, r"there are only 0 unlabelled samples; take smaller batches, fewer --num-labels"),
    ],
)
def test_each_process_needs_samples_for_its_part_of_a_batch(stages, samples, ranks, message):
    refused = nullcontext() if message is None else pytest.raises(ConfigError, match=message)
    with refused:
        check_all(config(stages), *samples, ranks)
