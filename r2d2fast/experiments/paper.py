"""The paper's tables: the ways to train that each compares, and the test errors that the paper gives for them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from r2d2fast.train.config import Config, Stage2
from r2d2fast.train.errors import ConfigError


class Paper(NamedTuple):
    """Test errors that the paper gives, in percent; None where it gives none."""

    test_error: float | None = None
    std: float | None = None
    test_error_top5: float | None = None


@dataclass(frozen=True)
class Variant:
    """One way to train, a row of a table.

    Attributes:
        name: the name of its run directories. Variants of one name are one run, whatever tables they are in.
        title: the heading of its row in a printed table.
        overrides: what it sets on top of the recipe and the command line, by the names of the trainer's flags.
        paper: the paper's figures.
        start: the variant whose network it begins with; None for fresh weights.
    """

    name: str
    title: str
    overrides: dict[str, Any]
    paper: Paper = field(default=Paper())
    start: "Variant | None" = None


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it compares.
        dataset: the data set that the paper trains with.
        variants: its rows, given the configuration that the recipe and the command line make.
        opponents: whether the paper compares with other methods here, of which those that were run are added.
    """

    title: str
    dataset: str
    variants: Callable[[Config], list[Variant]]
    opponents: bool = False


LABELS_ALONE = Variant("stage1", "labels alone", {"stages": (1,)})
ALL_LABELS = Variant("all-labels", "all labels", {"stages": (1,), "num_labels": 0, "num_labels_per_class": ()})
R2D2 = Variant("r2d2", "R2-D2", {"stages": (2, 3)}, start=LABELS_ALONE)


def d2_alone(two: Stage2) -> dict[str, Any]:
    """The overrides for a stage 2 without R2: it ends before the first reprediction, after 300 of 600 epochs on CIFAR-10."""
    return {
        "stage2.epochs": min(two.repredict_epochs, default=two.epochs),
        "stage2.repredict_epochs": (),
        "stage2.lrs": two.lrs[:1],
    }


def _ablation(name: str, title: str, overrides: dict[str, Any], test_error: float) -> Variant:
    """A variant of R2-D2: stages 2 and 3, from the network after stage 1 that all of them share."""
    return replace(R2D2, name=name, title=title, overrides=R2D2.overrides | overrides, paper=Paper(test_error))


def _table1(config: Config) -> list[Variant]:
    """To repeat stage 2 is to go on with it for as many epochs as R2 has, whatever changes at the beginning of R2."""
    two = config.stage2
    if not two.repredict_epochs:
        raise ConfigError(
            f"table1 compares with and without repredictions, but the recipe of {config.dataset} has none: "
            "give --stage2.epochs, --stage2.repredict-epochs and --stage2.lrs, or take another --dataset"
        )
    same_predictions = {"stage2.repredict": False}
    same_lr = {"stage2.lrs": two.lrs[:1] * len(two.lrs)}
    return [
        _ablation("d2", "a: D2, stage 2 once", d2_alone(two), 6.71),
        _ablation("repeated", "b: stage 2 repeated", same_predictions | same_lr, 6.37),
        _ablation("repredicted", "c: b + reprediction", same_lr, 6.23),
        _ablation("lowered", "d: b + lower learning rate", same_predictions, 5.94),
        _ablation("r2d2", "e: b + both, R2-D2", {}, 5.78),
    ]


def _table2(config: Config) -> list[Variant]:
    errors = {0.1: 5.78, 0.2: 5.44, 0.3: 5.81, 0.4: 5.90, 0.5: 6.11}
    return [_ablation(f"alpha{value}", f"alpha {value}", {"alpha": value}, error) for value, error in errors.items()]


def _table3(config: Config) -> list[Variant]:
    errors = {0.01: 5.62, 0.02: 5.75, 0.03: 5.78, 0.04: 5.83, 0.05: 5.76}
    return [_ablation(f"beta{value}", f"beta {value}", {"beta": value}, error) for value, error in errors.items()]


def _table4(config: Config) -> list[Variant]:
    errors = {"kl_reverse": 5.78, "kl": 8.06, "mse": 6.35}
    return [_ablation(name, name, {"class_loss": name}, error) for name, error in errors.items()]


def _against_supervised(labels_alone: Paper, r2d2: Paper) -> Callable[[Config], list[Variant]]:
    """The rows of a table of one data set. No figure of the paper for all labels was to hand, so that row has none."""
    return lambda config: [replace(LABELS_ALONE, paper=labels_alone), ALL_LABELS, replace(R2D2, paper=r2d2)]


TABLES = {
    "table1": Table("what R2 adds to D2", "cifar10", _table1),
    "table2": Table("weight of the class loss, alpha", "cifar10", _table2),
    "table3": Table("weight of the entropy, beta", "cifar10", _table3),
    "table4": Table("class loss", "cifar10", _table4),
    "table5": Table(
        "ImageNet", "imagenet", _against_supervised(Paper(52.23, None, 27.54), Paper(41.55, None, 19.52)), True
    ),
    "table6": Table("CIFAR-100", "cifar100", _against_supervised(Paper(38.36), Paper(32.87, 0.51)), True),
    "table7": Table("CIFAR-10", "cifar10", _against_supervised(Paper(14.90), Paper(5.72, 0.06)), True),
    "table8": Table("SVHN", "svhn", _against_supervised(Paper(11.27), Paper(3.64, 0.20)), True),
}


def figure2_variants(config: Config) -> list[Variant]:
    """The two networks that Figure 2 shows: after stage 1, and after D2."""
    network = {"backbone": "lenet2d"}
    before = Variant("lenet2d-stage1", "stage 1", network | {"stages": (1,)})
    return [before, Variant("lenet2d-d2", "D2", network | {"stages": (2,)} | d2_alone(config.stage2), start=before)]


FIGURE2_DATASET = "mnist"
