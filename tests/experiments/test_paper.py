"""The variants of every table and the paper's figures for them, written out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from r2d2fast.experiments.paper import TABLES, Paper, figure2_variants
from r2d2fast.experiments.runs import Repetition
from r2d2fast.train.checks import check_schedule
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.recipes import RECIPES, flags, override
from r2d2fast.train.schedule import make_schedule

CIFAR10 = RECIPES["cifar10"].config
FROM_STAGE_1 = {"stages": (2, 3)}

# Table 1: stage 2 once is D2 up to the first reprediction of the recipe; 0.12 is its learning rate there.
TABLE1 = {
    "d2": ({"stage2.epochs": 300, "stage2.repredict_epochs": (), "stage2.lrs": (0.12,)}, 6.71),
    "repeated": ({"stage2.repredict": False, "stage2.lrs": (0.12,) * 5}, 6.37),
    "repredicted": ({"stage2.lrs": (0.12,) * 5}, 6.23),
    "lowered": ({"stage2.repredict": False}, 5.94),
    "r2d2": ({}, 5.78),
}
ABLATIONS = {
    "table1": TABLE1,
    "table2": {f"alpha0.{n}": ({"alpha": n / 10}, error) for n, error in enumerate((5.78, 5.44, 5.81, 5.90, 6.11), 1)},
    "table3": {f"beta0.0{n}": ({"beta": n / 100}, error) for n, error in enumerate((5.62, 5.75, 5.78, 5.83, 5.76), 1)},
    "table4": {
        name: ({"class_loss": name}, error) for name, error in (("kl_reverse", 5.78), ("kl", 8.06), ("mse", 6.35))
    },
}
COMPARISONS = {
    "table5": ("imagenet", Paper(52.23, None, 27.54), Paper(41.55, None, 19.52)),
    "table6": ("cifar100", Paper(38.36), Paper(32.87, 0.51)),
    "table7": ("cifar10", Paper(14.90), Paper(5.72, 0.06)),
    "table8": ("svhn", Paper(11.27), Paper(3.64, 0.20)),
}


def test_what_the_variants_of_each_table_set_and_what_the_paper_has_there():
    assert list(TABLES) == [f"table{number}" for number in range(1, 9)] == [*ABLATIONS, *COMPARISONS]
    for name, expected in ABLATIONS.items():
        assert TABLES[name].dataset == "cifar10"
        variants = TABLES[name].variants(CIFAR10)
        assert [variant.name for variant in variants] == list(expected)
        for variant, (overrides, error) in zip(variants, expected.values(), strict=True):
            assert variant.overrides == FROM_STAGE_1 | overrides
            assert variant.paper == Paper(error)
            assert variant.start is not None
            assert (variant.start.name, variant.start.overrides) == ("stage1", {"stages": (1,)})
    for name, (dataset, labels_alone, r2d2) in COMPARISONS.items():
        assert TABLES[name].dataset == dataset
        variants = TABLES[name].variants(RECIPES[dataset].config)
        assert [(variant.title, variant.overrides, variant.paper) for variant in variants] == [
            ("labels alone", {"stages": (1,)}, labels_alone),
            ("all labels", {"stages": (1,), "num_labels": 0, "num_labels_per_class": ()}, Paper(None, None, None)),
            ("R2-D2", {"stages": (2, 3)}, r2d2),
        ]
        assert [variant.start and variant.start.name for variant in variants] == [None, None, "stage1"]


def test_predictions_and_learning_rates_of_table_1():
    seen = {}
    for variant in TABLES["table1"].variants(CIFAR10):
        config = replace(override(CIFAR10, variant.overrides), pretrained=Path("stage1.safetensors"))
        check_schedule(config, 4000, 46_000, 1)
        stage2 = [epoch for epoch in make_schedule(config, 4000, 46_000) if epoch.stage == 2]
        assert len(make_schedule(config, 4000, 46_000)) == len(stage2) + 50
        seen[variant.title[0]] = ([e.epoch for e in stage2 if e.predicts], [e.lr(0) for e in stage2])
    all_epochs, falling = [0.12] * 600, [0.12] * 375 + [0.08] * 75 + [0.04] * 75 + [0.004] * 75
    assert seen == {
        "a": ([0], [0.12] * 300),
        "b": ([0], all_epochs),
        "c": ([0, 300, 375, 450, 525], all_epochs),
        "d": ([0], falling),
        "e": ([0, 300, 375, 450, 525], falling),
    }


def test_overrides_change_what_they_name_and_nothing_else():
    changes = {"alpha": 0.5, "stage2.lrs": (1.0,), "stage2.epochs": 7, "stages": (1,)}
    before, after = flags(CIFAR10), flags(override(CIFAR10, changes))
    assert {name: value for name, value in after.items() if value != before[name]} == changes


def test_table_1_needs_repredictions():
    with pytest.raises(ConfigError, match=r"table1 .* the recipe of mnist has none: give --stage2\.epochs"):
        TABLES["table1"].variants(RECIPES["mnist"].config)


@pytest.mark.parametrize(("dataset", "epochs", "lr"), [("mnist", 30, 0.05), ("digits", 60, 0.12)])
def test_figure_2_is_stage_1_and_d2_alone_of_the_network_with_two_features(dataset, epochs, lr):
    stage1, d2 = figure2_variants(RECIPES[dataset].config)
    assert stage1.overrides == {"backbone": "lenet2d", "stages": (1,)}
    assert d2.start is stage1
    alone = {"stage2.epochs": epochs, "stage2.repredict_epochs": (), "stage2.lrs": (lr,)}
    assert d2.overrides == {"backbone": "lenet2d", "stages": (2,), **alone}


# --- the runs


def repetition(seed=0, split=0, base=CIFAR10):
    return Repetition(Path("all/cifar10"), base, seed, split)


def test_the_ablation_takes_sixteen_runs_a_seed_of_which_one_is_stage_1_and_one_r2d2():
    variants = [variant for name in ABLATIONS for variant in TABLES[name].variants(CIFAR10)]
    assert len(variants) == 18
    runs = repetition(3, 1).runs(variants)
    names = ["stage1", "d2", "repeated", "repredicted", "lowered", "r2d2"]
    names += [*(f"alpha0.{n}" for n in (2, 3, 4, 5)), *(f"beta0.0{n}" for n in (1, 2, 4, 5)), "kl", "mse"]
    assert [run.directory for run in runs] == [Path("all/cifar10/seed3-split1") / name for name in names]
    assert {(run.config.seed, run.config.split) for run in runs} == {(3, 1)}
    assert all(run.config.run_dir == run.directory for run in runs)
    stage1 = Path("all/cifar10/seed3-split1/stage1/network.safetensors")
    assert [run.config.pretrained for run in runs] == [None] + [stage1] * 15


def test_variants_of_one_directory_have_one_configuration():
    base = replace(CIFAR10, alpha=0.3)
    seen = {}
    for name in TABLES:
        for variant in TABLES[name].variants(base):
            run = repetition(base=base).run(variant)
            assert seen.setdefault(run.directory, run.config) == run.config
    # The command line's own alpha is R2-D2's now, and the recipe's has a directory.
    assert repetition(base=base).run(TABLES["table2"].variants(base)[2]).directory.name == "r2d2"
    assert repetition(base=base).run(TABLES["table2"].variants(base)[0]).directory.name == "alpha0.1"


def test_the_tables_of_one_data_set_share_stage_1_and_r2d2_with_the_ablation():
    runs = repetition().runs(TABLES["table7"].variants(CIFAR10))
    assert [run.directory.name for run in runs] == ["stage1", "all-labels", "r2d2"]
    assert [run.config.num_labels for run in runs] == [4000, 0, 4000]
    assert runs[2] == repetition().run(TABLES["table1"].variants(CIFAR10)[4])
