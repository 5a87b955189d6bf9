"""Schedules of other lengths than the recipe's: what hangs on the epochs of a stage goes with them."""

import math
from collections.abc import Collection
from typing import Any

from r2d2fast.tables import counted
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.recipes import flags, override, recipe_for, recipe_of

SCHEDULE = (
    "stage1.epochs", "stage1.cosine_epochs", "stage2.epochs", "stage2.repredict_epochs", "stage2.lrs", "stage3.epochs",
)  # fmt: skip
"""The flags that --schedule-scale may change."""
SCALED = "scaled"


def scaled(recipe: Config, asked: Config, given: Collection[str]) -> Config:
    """``asked``, with the epochs of all stages times its ``schedule_scale`` and what hangs on them (:func:`hanging`), but for the
    flags ``given``, which the command line has.

    Raises ConfigError for a scale that is none.
    """
    scale = asked.schedule_scale
    if not 0 < scale < math.inf:
        raise ConfigError(f"--schedule-scale {scale}: must be above 0, and finite; 1 is the recipe's own schedule")
    asked = override(asked, {name: value for name, value in scaled_epochs(recipe, scale).items() if name not in given})
    if "stage2.repredict_epochs" in given:
        given = {*given, "stage2.lrs"}  # whoever names the repredictions knows how many learning rates they need
    return override(asked, {name: value for name, value in hanging(recipe, asked).items() if name not in given})


def scaled_epochs(recipe: Config, scale: float) -> dict[str, int]:
    """The epochs of the recipe's stages, times ``scale``, by flag."""
    names = [name for name in SCHEDULE if name.endswith(".epochs")]
    return {name: max(1, round(scale * flags(recipe)[name])) for name in names}


def hanging(recipe: Config, config: Config) -> dict[str, Any]:
    """What hangs on the epochs that ``config`` has in place of those of its ``recipe``, by flag.

    The length of the cosine and the repredictions are in proportion, in whole epochs. A reprediction that would come before the
    stage begins is left out with its learning rate, and so is the earlier of two that would come before the same epoch.
    """
    one, two = recipe.stage1, recipe.stage2
    cosine = round(one.cosine_epochs * config.stage1.epochs / one.epochs)
    rates: dict[int, float] = {}
    for start, rate in zip(two.repredict_epochs, two.lrs[1:], strict=True):
        moved = min(round(start * config.stage2.epochs / two.epochs), config.stage2.epochs - 1)
        if moved > 0:
            rates[moved] = rate
    return {
        "stage1.cosine_epochs": max(cosine, config.stage1.epochs),
        "stage2.repredict_epochs": tuple(rates),
        "stage2.lrs": (two.lrs[0], *rates.values()),
    }


def chosen(config: Config) -> dict[str, Any]:
    """The flags by which a command line makes ``config`` of its recipe, and their values."""
    usual, recipe = flags(recipe_for(config.dataset, config.data_dir).config), recipe_of(config).config
    derived = scaled_epochs(recipe, config.schedule_scale) | hanging(recipe, config)
    return {
        name: value
        for name, value in flags(config).items()
        if value not in (usual[name], derived.get(name, usual[name])) and name not in ("dry_run", "split")
    }


def dropped(recipe: Config, config: Config) -> str | None:
    """A sentence on repredictions that :func:`hanging` has left out; None where there are none."""
    before, left = recipe.stage2.repredict_epochs, config.stage2.repredict_epochs
    if len(left) == len(before) or left != hanging(recipe, config)["stage2.repredict_epochs"] or 2 not in config.stages:
        return None
    rates = ",".join(map(str, config.stage2.lrs))
    where = f"before epoch{'s' * (len(left) > 1)} {','.join(map(str, left))}" if left else "so stage 2 is plain D2"
    return (
        f"{counted(config.stage2.epochs, 'epoch')} of stage 2: there is room for {len(left)} of {len(before)} repredictions, "
        f"{where}; learning rates {rates}"
    )
