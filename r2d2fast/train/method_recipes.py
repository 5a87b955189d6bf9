"""The recipe of a method on a data set: that of the data set, with what the method's authors set in place of R2-D2's own."""

from r2d2fast.train.errors import ConfigError
from r2d2fast.train.methods import METHODS
from r2d2fast.train.recipes import OURS, Recipe, Settings, flags, override

# Batches of that many samples, or a multiple, are dealt to any usual number of ranks.
_EIGHT = 8
_WITHOUT_R2: Settings = {
    "stage2.repredict_epochs": ((), OURS),
    "stage2.lrs": ((0.03,), OURS),
    "stage2.weight_decay": (None, OURS),
    "stage2.lr_schedule": ("constant", OURS),
    "stage2.distribution_alignment": (False, OURS),
    "stage2.labelled_error_limit": (None, OURS),
    "ema": (0.0, OURS),
}
OF_R2D2 = ("alpha", "beta", "class_loss", "label_", "stage2.repredict", "stage2.distribution", "stage2.labelled_error")
"""Beginnings of the names of R2-D2's own flags."""


def of_method(recipe: Recipe, method: str) -> Recipe:
    """``recipe``, which is a data set's for R2-D2, for another method. Batches are as large, with the method's share of labelled
    samples; where the authors had no such data set, stage 2 has as many epochs.
    Raises ConfigError for an unknown method."""
    if method == "r2d2":
        return recipe
    if method not in METHODS:
        raise ConfigError(f"--method {method}: unknown; accepted: {', '.join(METHODS)}")
    kind, two = METHODS[method], recipe.config.stage2
    batch = two.unlabelled_batch + two.labelled_batch
    labelled = max(round(kind.labelled_share * batch / _EIGHT), 1) * _EIGHT
    settings: Settings = {
        **_WITHOUT_R2,
        "stages": (kind.stages[0], OURS),
        "stage2.unlabelled_batch": (batch - labelled, OURS),
        "stage2.labelled_batch": (labelled, OURS),
        **kind.recipe,
        **kind.recipes.get(recipe.config.dataset, {}),
    }
    config = override(recipe.config, {flag: value for flag, (value, _) in settings.items()} | {"method": method})
    unused = (*OF_R2D2, *(f"stage{stage}." for stage in (1, 2, 3) if stage not in config.stages))
    sources = recipe.sources | {flag: source for flag, (_, source) in settings.items()}
    return Recipe(
        config, {flag: sources[flag] for flag in flags(config) if flag in sources and not flag.startswith(unused)}
    )
