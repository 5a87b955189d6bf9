"""The cells of the paper's tables: what each sets, and the error that the paper has there (DESIGN.md, section 6)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from r2d2fast.train.config import Config, Stage2
from r2d2fast.train.errors import ConfigError


class Paper(NamedTuple):
    """Figures of the paper, test errors in percent; None where it has none."""

    test_error: float | None = None
    std: float | None = None
    test_error_top5: float | None = None


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        name: of its run directories. Cells of one name are one run, whatever tables they are in.
        row: what a printed table calls it.
        switches: what it sets on top of the recipe and the command line, by the names of the trainer's flags.
        paper: the paper's figures.
        start: the cell whose network it begins with; None for fresh weights.
    """

    name: str
    row: str
    switches: dict[str, Any]
    paper: Paper = field(default=Paper())
    start: "Cell | None" = None


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it compares.
        dataset: the paper's.
        cells: its cells, of the configuration that the recipe and the command line give.
    """

    title: str
    dataset: str
    cells: Callable[[Config], list[Cell]]


LABELS_ALONE = Cell("stage1", "labels alone", {"stages": (1,)})
ALL_LABELS = Cell("all-labels", "all labels", {"stages": (1,), "num_labels": 0})
R2D2 = Cell("r2d2", "R2-D2", {"stages": (2, 3)}, start=LABELS_ALONE)


def changed(config: Config, switches: dict[str, Any]) -> Config:
    """``config`` with what ``switches`` set."""
    for flag, value in switches.items():
        stage, _, name = flag.rpartition(".")
        config = replace(
            config, **({stage: replace(getattr(config, stage), **{name: value})} if stage else {name: value})
        )
    return config


def d2_alone(two: Stage2) -> dict[str, Any]:
    """Switches for stage 2 without R2: what comes before the first reprediction, 300 of 600 epochs on CIFAR-10, is D2."""
    return {
        "stage2.epochs": min(two.repredict_epochs, default=two.epochs),
        "stage2.repredict_epochs": (),
        "stage2.lrs": two.lrs[:1],
    }


def _variant(name: str, row: str, switches: dict[str, Any], test_error: float) -> Cell:
    """A cell of the ablation: stages 2 and 3, from the network that all share."""
    return replace(R2D2, name=name, row=row, switches=R2D2.switches | switches, paper=Paper(test_error))


def _table1(config: Config) -> list[Cell]:
    """Repeating stage 2 is going on with it for as many epochs as R2 has, whether or not anything changes at its beginning."""
    two = config.stage2
    if not two.repredict_epochs:
        raise ConfigError(
            f"table1 switches repredictions off and on, but the recipe of {config.dataset} has none: "
            "give --stage2.epochs, --stage2.repredict-epochs and --stage2.lrs, or take another --dataset"
        )
    same_predictions = {"stage2.repredict": False}
    same_lr = {"stage2.lrs": two.lrs[:1] * len(two.lrs)}
    return [
        _variant("d2", "a: D2, stage 2 once", d2_alone(two), 6.71),
        _variant("repeated", "b: stage 2 repeated", same_predictions | same_lr, 6.37),
        _variant("repredicted", "c: b + reprediction", same_lr, 6.23),
        _variant("lowered", "d: b + lower learning rate", same_predictions, 5.94),
        _variant("r2d2", "e: b + both, R2-D2", {}, 5.78),
    ]


def _table2(config: Config) -> list[Cell]:
    errors = {0.1: 5.78, 0.2: 5.44, 0.3: 5.81, 0.4: 5.90, 0.5: 6.11}
    return [_variant(f"alpha{value}", f"alpha {value}", {"alpha": value}, error) for value, error in errors.items()]


def _table3(config: Config) -> list[Cell]:
    errors = {0.01: 5.62, 0.02: 5.75, 0.03: 5.78, 0.04: 5.83, 0.05: 5.76}
    return [_variant(f"beta{value}", f"beta {value}", {"beta": value}, error) for value, error in errors.items()]


def _table4(config: Config) -> list[Cell]:
    errors = {"kl_reverse": 5.78, "kl": 8.06, "mse": 6.35}
    return [_variant(name, name, {"class_loss": name}, error) for name, error in errors.items()]


def _against_supervised(labels_alone: Paper, r2d2: Paper) -> Callable[[Config], list[Cell]]:
    """Cells of a table of one data set, of which DESIGN.md has no figure of the paper for all labels."""
    return lambda config: [replace(LABELS_ALONE, paper=labels_alone), ALL_LABELS, replace(R2D2, paper=r2d2)]


TABLES = {
    "table1": Table("what R2 adds to D2", "cifar10", _table1),
    "table2": Table("weight of the class loss, alpha", "cifar10", _table2),
    "table3": Table("weight of the entropy, beta", "cifar10", _table3),
    "table4": Table("class loss", "cifar10", _table4),
    "table5": Table("ImageNet", "imagenet", _against_supervised(Paper(52.23, None, 27.54), Paper(41.55, None, 19.52))),
    "table6": Table("CIFAR-100", "cifar100", _against_supervised(Paper(38.36), Paper(32.87, 0.51))),
    "table7": Table("CIFAR-10", "cifar10", _against_supervised(Paper(14.90), Paper(5.72, 0.06))),
    "table8": Table("SVHN", "svhn", _against_supervised(Paper(11.27), Paper(3.64, 0.20))),
}


def figure2_cells(config: Config) -> list[Cell]:
    """The networks of Figure 2: after stage 1, and after D2."""
    network = {"backbone": "lenet2d"}
    before = Cell("lenet2d-stage1", "stage 1", network | {"stages": (1,)})
    return [before, Cell("lenet2d-d2", "D2", network | {"stages": (2,)} | d2_alone(config.stage2), start=before)]


FIGURE2_DATASET = "mnist"
