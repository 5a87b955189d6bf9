"""The recipe that a run began with, and which of its settings are the recipe's."""

from typing import NamedTuple

from r2d2fast.data.embeddings import count_labels
from r2d2fast.data.photographs.packed import is_packed
from r2d2fast.data.photographs.tree import image_names
from r2d2fast.report.groups import Group, value_text
from r2d2fast.report.runs import Run
from r2d2fast.train.config import Config
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.pseudo_labels import find_pseudo_labels, read_pseudo_labels
from r2d2fast.train.recipes import CHOSEN, NAMED, Recipe, flags, recipe_of
from r2d2fast.train.run_directory import CONFIG, read_settings

NOT_KNOWN = "not known"


class RunRecipe(NamedTuple):
    """The settings of a run, and the recipe that it began with."""

    config: Config
    recipe: Recipe

    def source(self, name: str) -> str:
        """Where the value of the setting ``name`` is from."""
        held, usual = flags(self.config), flags(self.recipe.config)
        if name not in held or name == "data_dir":  # whose absolute path does not show whether it was named
            return NOT_KNOWN
        if name in ("dataset", "method"):  # they choose the recipe
            return "default" if held[name] == getattr(Config, name) else CHOSEN
        source = self.recipe.sources.get(name, "default")
        if held[name] == usual[name]:
            return source
        return f"{CHOSEN}; the recipe has {value_text(usual[name])} ({source})"


def recipe_of_group(group: Group) -> RunRecipe | None:
    """That of the first run of which it can be told; None where it can of none."""
    return next((recipe for run in group.runs if (recipe := _recipe_of_run(run)) is not None), None)


def _recipe_of_run(run: Run) -> RunRecipe | None:
    try:
        config = read_settings(run.directory / CONFIG)
        return RunRecipe(config, recipe_of(config)) if _has_its_data(run, config) else None
    # Of settings, data or a library that are not there any more.
    except (TrainingError, ValueError, OSError, ImportError):
        return None


def _has_its_data(run: Run, config: Config) -> bool:
    """Whether the data by which the recipe was chosen are still there; where that hangs on none, True."""
    if config.dataset == "folder":
        return is_packed(config.data_dir) or next(image_names(config.data_dir), None) is not None
    if config.dataset == "embeddings":
        counts = count_labels(config.data_dir)
        takes_all = not (config.num_labels or config.num_labels_per_class)
        if counts is None or (takes_all and counts.labelled != run.labelled):
            return False
        recorded = next(iter(find_pseudo_labels(run.directory).values()), None)
        return recorded is None or len(read_pseudo_labels(recorded)[0]) == counts.samples
    # Those of torchvision and Hugging Face would have to be loaded.
    return not config.dataset.startswith(NAMED)
