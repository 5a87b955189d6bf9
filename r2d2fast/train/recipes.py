"""The recipes: a complete configuration for each data set, the defaults of its command line, each number with its source.

``PAPER``: Wang & Wu, AAAI 2020. ``REFERENCE``: their public implementation (CIFAR-10 only). ``OURS``: found or chosen here; for
all but the digits, Fashion-MNIST, folders of small images and embeddings a starting point that no run has confirmed yet.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from r2d2fast.image_options import TEST_FRACTION
from r2d2fast.train.config import Config, Stage1, Stage2, Stage3
from r2d2fast.train.embeddings_recipe import STAGE2_LR, fit_to_samples

if TYPE_CHECKING:
    from r2d2fast.data import Dataset
    from r2d2fast.data.embeddings import LabelCounts

PAPER, REFERENCE, OURS, CHOSEN, NETWORK = (
    "paper",
    "reference implementation",
    "ours",
    "command line",
    "the network's weights",
)
# AdamW's learning rates and weight decay are so many times those of SGD; tuned on the digits (bench/results/digits.md). In a
# step it then takes from a weight twice what SGD takes by its momentum of 0.9. PyTorch's own decay, 0.01, takes next to nothing,
# and is worse by 2 points.
ADAMW_LR, ADAMW_WEIGHT_DECAY = 0.02, 1000.0


class Recipe(NamedTuple):
    """Defaults, and where each is from, by the name of its flag; what is not listed is from nobody but a default of ours."""

    config: Config
    sources: dict[str, str]


Settings = dict[str, tuple[Any, str]]
"""(value, source) by the name of its flag."""


def _recipe(name: str, settings: Settings) -> Recipe:
    values: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {"stage1": {}, "stage2": {}, "stage3": {}}
    for flag, (value, _) in settings.items():
        stage, _, inner = flag.rpartition(".")
        (stages[stage] if stage else values)[inner] = value
    kinds = Stage1(**stages["stage1"]), Stage2(**stages["stage2"]), Stage3(**stages["stage3"])
    config = Config(dataset=name, **values, stage1=kinds[0], stage2=kinds[1], stage3=kinds[2])
    sources = dict.fromkeys(("alpha", "beta", "class_loss"), PAPER)
    sources |= dict.fromkeys(("label_scale", "momentum"), REFERENCE)
    sources |= dict.fromkeys(("bn_groups", "input_noise", "weight_norm", "optimizer", "ema"), OURS)
    of_stage2 = ("weight_decay", "lr_schedule", "distribution_alignment", "labelled_error_limit")
    sources |= dict.fromkeys((f"stage2.{name}" for name in of_stage2), OURS)
    return Recipe(config, sources | {flag: source for flag, (_, source) in settings.items()})


def flags(config: Config) -> dict[str, Any]:
    """All values by the name of their flag, those of stages as ``stage1.epochs``."""
    result: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            result |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        else:
            result[field.name] = value
    return result


def override(config: Config, overrides: dict[str, Any]) -> Config:
    """``config`` with the values of ``overrides``, by the names of the trainer's flags."""
    for flag, value in overrides.items():
        stage, _, name = flag.rpartition(".")
        config = replace(
            config, **({stage: replace(getattr(config, stage), **{name: value})} if stage else {name: value})
        )
    return config


# The reference implementation's run of CIFAR-10, on which the recipes for other data sets of its kind build. It repredicts after
# 300 of 600 epochs and three times more, 75 epochs apart.
_CIFAR10: Settings = {
    "num_labels": (4000, PAPER),
    "backbone": ("shake26-96", PAPER),
    "label_lr": (4000.0, REFERENCE),
    "weight_decay": (2e-4, REFERENCE),
    "translate": (4, REFERENCE),
    "border": ("reflect", REFERENCE),
    "flip": (True, REFERENCE),
    "cutout": (16, REFERENCE),
    "stage1.epochs": (300, REFERENCE),
    "stage1.batch": (40, REFERENCE),
    "stage1.lr": (0.05, REFERENCE),
    "stage1.cosine_epochs": (350, REFERENCE),
    "stage2.epochs": (600, REFERENCE),
    "stage2.unlabelled_batch": (384, REFERENCE),
    "stage2.labelled_batch": (128, REFERENCE),
    "stage2.repredict_epochs": ((300, 375, 450, 525), REFERENCE),
    "stage2.repredict": (True, PAPER),
    "stage2.lrs": ((0.12, 0.12, 0.08, 0.04, 0.004), REFERENCE),
    "stage3.epochs": (50, REFERENCE),
    "stage3.batch": (512, REFERENCE),
    "stage3.lr": (0.01, REFERENCE),
    "stage3.hard_labels": ("repredict", REFERENCE),
}

# Small images of other kinds, a schedule that a CPU gets through: no cutout, empty borders.
_SMALL: Settings = _CIFAR10 | {
    "weight_decay": (5e-4, OURS),
    "translate": (2, OURS),
    "border": ("background", OURS),
    "flip": (False, OURS),
    "cutout": (0, OURS),
    "stage1.epochs": (100, OURS),
    "stage1.batch": (100, OURS),
    "stage1.cosine_epochs": (100, OURS),
    "stage2.epochs": (40, OURS),
    "stage2.repredict_epochs": ((20, 25, 30, 35), OURS),
    "stage3.epochs": (5, OURS),
}

# Where few epochs have to do: one phase of D2, in which a pseudo-label averages over the networks of all epochs and ends better
# than the last of them; then a stage 3 long enough for the network to learn that.
_ONE_PHASE: Settings = {
    "alpha": (1.0, OURS),
    "beta": (0.1, OURS),
    "label_lr": (400.0, OURS),  # the reference implementation's effective step
    "ema": (0.99, OURS),
    "stage2.epochs": (12, OURS),
    "stage2.repredict_epochs": ((), OURS),
    "stage2.lrs": ((0.05,), OURS),
    "stage2.weight_decay": (1e-4, OURS),
    "stage3.epochs": (4, OURS),
    "stage3.batch": (128, OURS),
    "stage3.lr": (0.05, OURS),
    "stage3.hard_labels": ("pseudo", PAPER),
}

_RECIPES: dict[str, Settings] = {
    "digits": _SMALL
    | {
        "num_labels": (50, OURS),
        "backbone": ("small", OURS),
        "label_lr": (1000.0, OURS),  # the reference implementation's effective step, for a batch of 128
        "weight_decay": (1e-3, OURS),
        "translate": (1, OURS),
        "stage1.epochs": (200, OURS),
        "stage1.batch": (25, OURS),
        "stage1.cosine_epochs": (200, OURS),
        "stage2.epochs": (120, OURS),
        "stage2.unlabelled_batch": (96, OURS),
        "stage2.labelled_batch": (32, OURS),
        "stage2.repredict_epochs": ((60, 75, 90, 105), OURS),
        "stage3.epochs": (15, OURS),
        "stage3.batch": (128, OURS),
    },
    # For Figure 2: stage 1 and D2 alone.
    "mnist": _SMALL
    | {
        "num_labels": (1000, PAPER),
        "stages": ((1, 2), PAPER),
        "backbone": ("lenet2d", PAPER),
        "stage2.epochs": (30, OURS),
        "stage2.repredict_epochs": ((), PAPER),
        "stage2.lrs": ((0.05,), OURS),
    },
    "fashion-mnist": _SMALL
    | _ONE_PHASE
    | {
        "num_labels": (1000, OURS),
        "backbone": ("small", OURS),
        "flip": (True, OURS),
        "stage1.epochs": (300, OURS),
        "stage1.cosine_epochs": (300, OURS),
    },
    "svhn": _CIFAR10
    | {
        "num_labels": (1000, PAPER),
        "backbone": ("convlarge", PAPER),
        "translate": (2, OURS),
        "flip": (False, OURS),
        "stage1.batch": (100, OURS),
        "stage1.lr": (0.05, OURS),
    },
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR10
    | {
        "num_labels": (10_000, PAPER),
        "backbone": ("convlarge", PAPER),
        "stage1.batch": (128, OURS),
        "stage1.lr": (0.1, OURS),
    },
    "imagenet": _CIFAR10
    | {
        "num_labels": (128_000, PAPER),
        "backbone": ("resnet18", PAPER),
        "weight_decay": (1e-4, OURS),
        "translate": (0, OURS),
        "flip": (True, OURS),
        "cutout": (0, OURS),
        "workers": (8, OURS),
        "image_size": (224, OURS),
        "resize": (256, OURS),
        "stage1.epochs": (200, OURS),
        "stage1.batch": (256, OURS),
        "stage1.lr": (0.1, OURS),
        "stage1.cosine_epochs": (200, OURS),
        "stage2.epochs": (60, OURS),
        "stage2.repredict_epochs": ((30, 38, 46, 54), OURS),
        "stage3.epochs": (10, OURS),
    },
    "folder": _CIFAR10
    | {
        "num_labels": (0, OURS),
        "backbone": ("resnet18", OURS),
        "label_lr": (1000.0, OURS),  # the reference implementation's effective step, for a batch of 128
        "weight_decay": (1e-4, OURS),
        "translate": (0, OURS),
        "cutout": (0, OURS),
        "image_size": (224, OURS),
        "resize": (256, OURS),
        "stage1.epochs": (100, OURS),
        "stage1.batch": (64, OURS),
        "stage1.cosine_epochs": (100, OURS),
        "stage2.epochs": (60, OURS),
        "stage2.unlabelled_batch": (96, OURS),
        "stage2.labelled_batch": (32, OURS),
        "stage2.repredict_epochs": ((30, 38, 46, 54), OURS),
        "stage2.lrs": ((0.03, 0.03, 0.02, 0.01, 0.001), OURS),
        "stage3.epochs": (10, OURS),
        "stage3.batch": (128, OURS),
        "stage3.lr": (0.0025, OURS),
    },
    "embeddings": _CIFAR10
    | {
        "num_labels": (0, OURS),
        "stages": ((1, 2), OURS),
        "backbone": ("linear", OURS),
        "hidden_layer_sizes": ((256,), OURS),
        "dropout": (0.5, OURS),
        "feature_length": (10.0, OURS),
        "label_lr": (33280.0, OURS),  # an effective step of 4 for a batch of 832, five times the reference implementation's
        "weight_decay": (5e-4, OURS),
        "ema": (0.99, OURS),
        "translate": (0, OURS),
        "flip": (False, OURS),
        "cutout": (0, OURS),
        "stage1.epochs": (200, OURS),
        "stage1.batch": (256, OURS),
        "stage1.lr": (0.2, OURS),
        "stage1.cosine_epochs": (200, OURS),
        "stage2.epochs": (16, OURS),
        "stage2.unlabelled_batch": (768, OURS),
        "stage2.labelled_batch": (64, OURS),
        "stage2.repredict_epochs": ((4, 8, 12), OURS),
        "stage2.lrs": ((1.0, 1.0, 1.0, 1.0), OURS),
        "stage2.weight_decay": (5e-5, OURS),
        "stage2.distribution_alignment": (True, OURS),
        "stage2.labelled_error_limit": (6.0, OURS),
        "stage3.epochs": (5, OURS),
        "stage3.batch": (1024, OURS),
    },
}  # fmt: skip

RECIPES = {name: _recipe(name, settings) for name, settings in _RECIPES.items()}

# A folder whose images all have one size of at most 64 pixels: found with 4000 labels of CIFAR-10 (bench/results/cifar10.md).
# Batches are as large as for other folders, of which few images may be unlabelled.
SMALL_FOLDER = _recipe(
    "folder",
    _SMALL
    | _ONE_PHASE
    | {
        "num_labels": (0, OURS),
        "backbone": ("conv4", OURS),
        "label_lr": (100.0, OURS),  # the reference implementation's effective step, for a batch of 128
        # With 100 and 30 of stage 2 the end is the same, and 0.9 points worse where all is a quarter as long.
        "stage1.epochs": (200, OURS),
        "stage1.batch": (64, OURS),
        "stage1.cosine_epochs": (200, OURS),
        "stage2.epochs": (23, OURS),
        "stage2.unlabelled_batch": (96, OURS),
        "stage2.labelled_batch": (32, OURS),
        "stage3.epochs": (6, OURS),
    },
)


NAMED = ("torchvision:", "hf:")
"""What the names of data sets begin with that have no recipe of their own but that of the kind of their images."""
CHOICES = (
    *("num_labels", "num_labels_per_class", "optimizer", "method", "backbone", "pretrained"),
    *("download", "test_fraction"),
)
"""The flags, besides those of the data set and its place, on which the values of others depend: what :func:`recipe_for` takes."""
IN_PYTHON = "python"
"""The name of a data set that a program has made."""


def is_known(dataset: str) -> bool:
    """Whether there is a recipe for a data set of this name."""
    return dataset in RECIPES or (dataset.startswith(NAMED) and dataset not in NAMED)


def recipe_for(
    dataset: "str | Dataset",
    data_dir: Path = Path("data"),
    *,
    num_labels: int | None = None,
    num_labels_per_class: tuple[int, ...] = (),
    optimizer: str | None = None,
    method: str = "r2d2",
    backbone: str | None = None,
    pretrained: Path | None = None,
    download: bool = False,
    test_fraction: float = TEST_FRACTION,
) -> Recipe:
    """The recipe of a data set, with what was chosen beside it and decides other values, too.

    Args:
        dataset: a name that ``--dataset`` takes; KeyError for another one. Or a data set that the program has made.
        data_dir: of its files: a ``folder`` has a recipe for the kind of its images, ``embeddings`` one for the number of samples
            and labels, if the files are there.
        num_labels: of all labels, 0 for all of them; None takes the recipe's number.
        num_labels_per_class: one number for every class, or one for each, in place of ``num_labels``.
        optimizer: as ``--optimizer``.
        method: as ``--method``; ConfigError for another one.
        backbone: as ``--backbone``.
        pretrained: as ``--pretrained``: photographs have the size that the weights were made with.
        download, test_fraction: as the flags, of a data set of torchvision or Hugging Face, which has to be opened.
    """
    counts = None
    if not isinstance(dataset, str):
        recipe, counts = _of_images(dataset, IN_PYTHON)
    elif dataset.startswith(NAMED):
        recipe = _of_named(dataset, data_dir, download, test_fraction)
    else:
        recipe = SMALL_FOLDER if dataset == "folder" and _small_images(data_dir) else RECIPES[dataset]
        counts = _counted(data_dir) if dataset == "embeddings" else None
    usual = flags(recipe.config)
    choices: dict[str, Any] = {"num_labels": num_labels, "num_labels_per_class": num_labels_per_class or None}
    choices |= {"backbone": backbone, "pretrained": pretrained}
    chosen = {name: value for name, value in choices.items() if value not in (None, usual[name])}
    recipe = Recipe(override(recipe.config, chosen), recipe.sources | dict.fromkeys(chosen, CHOSEN))
    if recipe.config.backbone in STAGE2_LR:
        recipe = _for_embeddings(recipe, counts)
    if method != "r2d2":  # whose batches are as large
        from r2d2fast.train.method_recipes import of_method

        recipe = of_method(recipe, method)
    if pretrained is not None and "image_size" in recipe.sources:
        recipe = _for_network(recipe)
    return _with_adamw(recipe) if optimizer == "adamw" != recipe.config.optimizer else recipe


def recipe_of(config: Config) -> Recipe:
    """The recipe whose values ``config`` has where the command line has not changed them."""
    return recipe_for(config.dataset, config.data_dir, **{name: getattr(config, name) for name in CHOICES})


# Within the functions what brings PyTorch with it, for which no --help needs to wait.


def _small_images(data_dir: Path) -> bool:
    from r2d2fast.data import small_image_shape

    return small_image_shape(data_dir) is not None


def _of_named(name: str, data_dir: Path, download: bool, test_fraction: float) -> Recipe:
    from r2d2fast.data import DataError, load_named

    try:
        return _of_images(load_named(name, data_dir, download, test_fraction), name)[0]
    except DataError:  # told where the data are needed, and not by --help
        return Recipe(replace(RECIPES["folder"].config, dataset=name), RECIPES["folder"].sources)


def _of_images(dataset: "Dataset", name: str) -> "tuple[Recipe, LabelCounts | None]":
    """The recipe of the kind of images, or embeddings, that a data set has; of embeddings their numbers, too."""
    from r2d2fast.data import Embeddings, ResidentImages
    from r2d2fast.data.embeddings import LabelCounts

    recipe, counts = RECIPES["folder"], None
    if isinstance(dataset.train, ResidentImages):
        recipe = SMALL_FOLDER
    elif isinstance(dataset.train, Embeddings):
        labelled = int((dataset.train_labels >= 0).sum())
        recipe, counts = RECIPES["embeddings"], LabelCounts(len(dataset.train), labelled, dataset.num_classes)
    return Recipe(replace(recipe.config, dataset=name), recipe.sources), counts


def _counted(data_dir: Path) -> "LabelCounts | None":
    from r2d2fast.data.embeddings import count_labels

    return count_labels(data_dir)


def _for_network(recipe: Recipe) -> Recipe:
    from r2d2fast.models import own_images

    own = own_images(recipe.config.backbone)
    if own is None:
        return recipe
    sizes = {"image_size": own.image_size, "resize": own.resize}
    return Recipe(override(recipe.config, sizes), recipe.sources | dict.fromkeys(sizes, NETWORK))


def _for_embeddings(recipe: Recipe, counts: "LabelCounts | None") -> Recipe:
    """With the learning rate of the backbone, and the numbers that follow those of samples and labels."""
    two = recipe.config.stage2
    lrs = (STAGE2_LR.get(recipe.config.backbone, two.lrs[0]),) * len(two.lrs)
    config = override(recipe.config, {"stage2.lrs": lrs})
    if counts is not None:
        per_class = config.num_labels_per_class
        labelled = (
            sum(per_class) * (counts.classes if len(per_class) == 1 else 1) or config.num_labels or counts.labelled
        )
        config = fit_to_samples(config, labelled, counts.samples - labelled, counts.classes)
    return Recipe(config, recipe.sources)


def _with_adamw(recipe: Recipe) -> Recipe:
    """Learning rates and weight decay in proportion to those of SGD."""
    config = recipe.config
    of_stage2 = config.stage2.weight_decay
    ours = {
        "stage1.lr": config.stage1.lr * ADAMW_LR,
        "stage2.lrs": tuple(lr * ADAMW_LR for lr in config.stage2.lrs),
        "stage2.weight_decay": None if of_stage2 is None else of_stage2 * ADAMW_WEIGHT_DECAY,
        "stage3.lr": config.stage3.lr * ADAMW_LR,
        "weight_decay": config.weight_decay * ADAMW_WEIGHT_DECAY,
    }
    sources = recipe.sources | dict.fromkeys(ours, OURS) | {"optimizer": CHOSEN}
    return Recipe(override(config, {"optimizer": "adamw", **ours}), sources)
