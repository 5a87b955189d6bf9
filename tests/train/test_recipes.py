"""The recipes against their numbers written out by hand, and against the true sizes of their data sets."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from r2d2fast import R2D2Classifier, load_run, recipe_for
from r2d2fast.train import cli
from r2d2fast.train.checks import check_schedule, check_values
from r2d2fast.train.config import Config
from r2d2fast.train.recipes import OURS, PAPER, RECIPES, REFERENCE, flags
from r2d2fast.train.schedule import make_schedule

# Training images and side in pixels.
SIZES = {
    "digits": (1437, 8),
    "mnist": (60_000, 28),
    "fashion-mnist": (60_000, 28),
    "svhn": (73_257, 32),
    "cifar10": (50_000, 32),
    "cifar100": (50_000, 32),
    "imagenet": (1_281_167, 224),
}
# What decides how a network learns; every other field is about where and how the program runs.
OPERATION = {
    *("dataset", "data_dir", "download", "config", "seed", "split", "split_file", "stages", "run_dir"),
    *(
        "resume",
        "eval_only",
        "dry_run",
        "runs",
        "device",
        "threads",
        "precision",
        "compile",
        "cuda_graphs",
        "deterministic",
        "workers",
    ),
    *("on_bad_image", "decoder", "log_interval", "checkpoint_minutes", "tracker", "profile", "onnx", "pretrained"),
    *("bank_dtype", "bank_storage", "test_fraction", "schedule_scale", "num_labels_per_class"),
}
# Of other methods, whose recipes test_methods.py has.
OF_OTHERS = {name for name in flags(RECIPES["cifar10"].config) if name == "method" or name.startswith("unlabelled.")}
LEARNING = {name for name in flags(RECIPES["cifar10"].config) if name not in OPERATION | OF_OTHERS}
PHOTOGRAPHS = {"image_size": 224, "resize": 256}
EMBEDDINGS = {"hidden_layer_sizes", "dropout", "feature_length"}


def stage(number, **values):
    return {f"stage{number}.{name}": value for name, value in values.items()}


LRS = (0.12, 0.12, 0.08, 0.04, 0.004)
LOSS = {"alpha": 0.1, "beta": 0.03, "class_loss": "kl_reverse", "label_lr": 4000.0, "label_scale": 10.0}
NETWORK = {"backbone": "shake26-96", "bn_groups": 1, "input_noise": False, "weight_norm": False}
AUGMENTATION = {"translate": 4, "border": "reflect", "flip": True, "cutout": 16}
BATCHES = {"unlabelled_batch": 384, "labelled_batch": 128}
CIFAR10 = {
    **{"num_labels": 4000, "stages": (1, 2, 3), "weight_decay": 2e-4},
    **{"optimizer": "sgd", "momentum": 0.9, "ema": 0.0},
    **LOSS,
    **NETWORK,
    **AUGMENTATION,
    **stage(1, epochs=300, batch=40, lr=0.05, cosine_epochs=350),
    **stage(2, epochs=600, **BATCHES, repredict_epochs=(300, 375, 450, 525), repredict=True, lrs=LRS),
    **stage(2, weight_decay=None, lr_schedule="constant", distribution_alignment=False, labelled_error_limit=None),
    **stage(3, epochs=50, batch=512, lr=0.01, hard_labels="repredict"),
}
CONVLARGE = CIFAR10 | {"backbone": "convlarge"}
RESNET18 = {"backbone": "resnet18", "stages": (1, 2, 3), "weight_decay": 1e-4, "cutout": 0, **PHOTOGRAPHS}
EXPECTED = {
    "cifar10": CIFAR10,
    "cifar100": CONVLARGE | {"num_labels": 10_000, **stage(1, epochs=300, batch=128, lr=0.1)},
    "svhn": CONVLARGE | {"num_labels": 1000, "translate": 2, "flip": False, **stage(1, epochs=300, batch=100, lr=0.05)},
    "imagenet": RESNET18
    | {"num_labels": 128_000, "flip": True, **stage(1, epochs=200, batch=256, lr=0.1, cosine_epochs=200)}
    | {**stage(2, **BATCHES, lrs=LRS), **stage(3, epochs=10, lr=0.01)},
    "mnist": {"num_labels": 1000, "stages": (1, 2), "backbone": "lenet2d", "stage2.repredict_epochs": ()},
    "digits": {"num_labels": 50, "backbone": "small", "stages": (1, 2, 3)},
    "fashion-mnist": {
        "num_labels": 1000,
        "backbone": "small",
        "stages": (1, 2, 3),
        "alpha": 1.0,
        "beta": 0.1,
        "ema": 0.99,
    }
    | stage(2, epochs=12, repredict_epochs=(), lrs=(0.05,), lr_schedule="constant", weight_decay=1e-4)
    | stage(3, epochs=4, batch=128, lr=0.05, hard_labels="pseudo"),
    "folder": RESNET18 | {"num_labels": 0},
    "embeddings": {"num_labels": 0, "stages": (1, 2), "backbone": "linear", "translate": 0, "flip": False, "cutout": 0},
}


def schedule_of(name, ranks=1):
    config = RECIPES[name].config
    samples, _ = SIZES[name]
    return make_schedule(config, config.num_labels, samples - config.num_labels, ranks)


def steps_of(schedule, stage):
    (steps,) = {epoch.steps for epoch in schedule if epoch.stage == stage}
    return steps


def test_there_is_a_recipe_for_every_data_set_and_it_holds_the_numbers_written_out_above():
    assert set(RECIPES) == {*SIZES, "folder", "embeddings"} == set(EXPECTED)
    for name, recipe in RECIPES.items():
        assert recipe.config.dataset == name
        values = flags(recipe.config)
        assert {flag: values[flag] for flag in EXPECTED[name]} == EXPECTED[name], name
        if name == "embeddings":
            continue
        # A quarter of a batch is labelled, and λ·α/D_u is the reference implementation's 4000 · 0.1 / 512.
        config, two = recipe.config, recipe.config.stage2
        assert two.unlabelled_batch == 3 * two.labelled_batch
        assert config.label_lr * config.alpha / (4 * two.labelled_batch) == pytest.approx(0.78125)


def test_what_decides_how_cifar10_learns_is_all_written_out_above():
    assert CIFAR10.keys() == LEARNING - PHOTOGRAPHS.keys() - EMBEDDINGS | {"stages"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_has_a_source_and_the_reference_implementation_s_run_of_cifar10_what_is_from_it(name):
    recipe, values = RECIPES[name], flags(RECIPES[name].config)
    photographs = PHOTOGRAPHS.keys() if name in ("imagenet", "folder") else set()
    embeddings = EMBEDDINGS if name == "embeddings" else set()
    assert recipe.sources.keys() - OPERATION == LEARNING - PHOTOGRAPHS.keys() - EMBEDDINGS | photographs | embeddings
    assert set(recipe.sources.values()) <= {PAPER, REFERENCE, OURS}
    assert recipe.sources.keys() <= flags(recipe.config).keys()
    borrowed = {flag: values[flag] for flag, source in recipe.sources.items() if source == REFERENCE}
    assert borrowed == {flag: CIFAR10[flag] for flag in borrowed}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_recipe_fits_its_data_set_on_any_usual_number_of_ranks(ranks):
    for name, (samples, side) in SIZES.items():
        config = RECIPES[name].config
        check_values(config, (3, side, side), ranks)
        check_schedule(config, config.num_labels, samples - config.num_labels, ranks)
        assert all(epoch.steps > 0 for epoch in schedule_of(name, ranks))
    config = RECIPES["folder"].config  # a hundred labelled and a hundred unlabelled images
    check_values(config, (3, 224, 224), 1)
    check_schedule(config, 100, 100, 1)


def test_the_steps_and_learning_rates_of_cifar10_are_those_of_the_reference_implementation():
    schedule = schedule_of("cifar10")
    assert [sum(epoch.stage == stage for epoch in schedule) for stage in (1, 2, 3)] == [300, 600, 50]
    assert (steps_of(schedule, 1), steps_of(schedule, 2), steps_of(schedule, 3)) == (100, 119, 98)
    predictions = [(epoch.stage, epoch.epoch) for epoch in schedule if epoch.predicts]
    assert predictions == [(2, 0), (2, 300), (2, 375), (2, 450), (2, 525), (3, 0)]
    lrs = [epoch.lr(0) for epoch in schedule if epoch.stage == 2]
    assert lrs == [0.12] * 375 + [0.08] * 75 + [0.04] * 75 + [0.004] * 75
    # Stage 1 ends where a cosine of 350 epochs is after 300; stage 3 runs to its end.
    assert schedule[0].lr(0) == pytest.approx(0.05)
    assert schedule[175].lr(0) == pytest.approx(0.025)
    assert schedule[299].lr(99) == pytest.approx(0.05 * 0.0495, rel=0.01)
    assert schedule[900].lr(0) == pytest.approx(0.01)
    assert schedule[949].lr(97) < 1e-7


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("cifar100", (79, 104, 98)),  # 10 000 / 128 = 78 and 16 samples; 40 000 / 384; 50 000 / 512 = 97 and 336
        ("svhn", (10, 188, 144)),  # 72 257 / 384; 73 257 / 512 = 143 and 41
        ("imagenet", (500, 3003, 2503)),  # 128 000 / 256; 1 153 167 / 384; 1 281 167 / 512 = 2502 and 143
    ],
)
def test_steps_of_an_epoch_of_each_stage(name, steps):
    schedule = schedule_of(name)
    assert tuple(steps_of(schedule, stage) for stage in (1, 2, 3)) == steps


def test_imagenet_is_half_plain_d2_and_its_learning_rates_fall_by_the_factors_of_cifar10():
    schedule = [epoch for epoch in schedule_of("imagenet") if epoch.stage == 2]
    assert 60 <= len(schedule) <= 90
    first = next(epoch.epoch for epoch in schedule if epoch.repredicts)
    assert first == len(schedule) // 2
    peak = schedule[0].lr(0)
    factors = sorted({round(epoch.lr(0) / peak, 6) for epoch in schedule}, reverse=True)
    assert factors == pytest.approx([1, 2 / 3, 1 / 3, 1 / 30], abs=1e-6)
    stage3 = next(epoch for epoch in schedule_of("imagenet") if epoch.stage == 3)
    assert stage3.lr(0) == pytest.approx(peak / 12)
    assert schedule_of("imagenet")[199].lr(499) < 1e-5  # stage 1's cosine runs to its end


def test_flags_are_every_field_by_the_name_of_its_flag():
    values = flags(RECIPES["digits"].config)
    config = RECIPES["digits"].config
    stages = ("stage1", "stage2", "stage3", "unlabelled")
    expected = {field.name for field in fields(Config)} - set(stages)
    expected |= {f"{stage}.{field.name}" for stage in stages for field in fields(getattr(config, stage))}
    assert values.keys() == expected
    assert (values["stage2.lrs"], values["seed"]) == (config.stage2.lrs, config.seed)


@pytest.mark.parametrize("dataset", ["digits", "embeddings"])
def test_adamw_s_learning_rates_and_weight_decay_are_in_proportion_to_those_of_sgd(dataset):
    sgd, adamw = recipe_for(dataset).config, recipe_for(dataset, optimizer="adamw").config
    assert adamw.optimizer == "adamw"
    rates = [(one.stage1.lr, *one.stage2.lrs, one.stage3.lr) for one in (sgd, adamw)]
    assert rates[1] == pytest.approx([0.02 * lr for lr in rates[0]])
    assert adamw.weight_decay == pytest.approx(1000 * sgd.weight_decay)
    own = sgd.stage2.weight_decay
    assert adamw.stage2.weight_decay == (None if own is None else pytest.approx(1000 * own))


def test_embeddings_have_on_the_command_line_the_numbers_that_the_estimator_takes(tmp_path):
    """And so the same network, to the last bit, from the same seed."""
    truth = np.arange(600) % 4
    few = np.where(np.arange(600) < 24, truth, -1)
    x = (np.eye(4, 12)[truth] + 0.5 * np.random.default_rng(0).normal(size=(600, 12))).astype(np.float32)
    np.save(tmp_path / "train.npy", x)
    np.save(tmp_path / "train_labels.npy", few)
    for backbone, sizes in (("linear", ()), ("mlp", (256,))):
        flags = ["--dataset=embeddings", f"--data-dir={tmp_path}", "--device=cpu", f"--backbone={backbone}"]
        estimator = R2D2Classifier(sizes, random_state=0, device="cpu").fit(x, few)
        seed = int(np.random.RandomState(0).randint(np.iinfo(np.int32).max))
        trained = cli.main([*flags, f"--seed={seed}", f"--run-dir={tmp_path / backbone}"])
        assert trained == 0
        network = load_run(tmp_path / backbone, "cpu").model.state_dict()
        assert all(torch.equal(network[name], tensor) for name, tensor in estimator._network.state_dict().items())
    # The number of labels is that which is asked for, or the lines of a file.
    config = cli.parse(["--dataset=embeddings", f"--data-dir={tmp_path}", "--num-labels=8", "--stage2.epochs=20"])
    assert (config.stage2.unlabelled_batch, config.stage1.epochs, config.stage2.epochs) == (64, 300, 20)
