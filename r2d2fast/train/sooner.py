"""What takes an hour or less where a run on photographs would take a CPU longer, as commands to copy."""

import math
import shlex

from rich.console import Console

from r2d2fast.command import as_called
from r2d2fast.tables import say
from r2d2fast.train.measure import Speed, duration, measure_speed, scratch_trainer
from r2d2fast.train.recipes import RECIPES, flags, override
from r2d2fast.train.scaling import chosen
from r2d2fast.train.trainer import Trainer

LONG = 3600.0
SMALL = {"backbone": "small", "image_size": 64, "resize": 72}
EMBEDDER = "torchvision:resnet18"


def print_sooner(trainer: Trainer, speed: Speed, console: Console) -> None:
    """Print commands that take an hour or less with the folder of ``trainer``, whose ``speed`` was measured: a classifier of
    embeddings, and a smaller network on smaller images, with a shorter schedule where even that takes longer."""
    config = trainer.config
    say(console, "That is long. Sooner on this machine, as commands to copy:")
    dest = f"{config.data_dir}-embeddings"
    recipe = flags(RECIPES["folder"].config)
    usual = all(flags(config)[name] == recipe[name] for name in ("backbone", "image_size"))
    time = f", about {duration((len(trainer.data.train) + len(trainer.data.test)) * speed.image)}" if usual else ""
    say(console, f"Embeddings by a pretrained network, whose weights are downloaded{time}, and a classifier of them:")
    shared = {name: value for name, value in chosen(config).items() if name in ("test_fraction", "on_bad_image")}
    _print_command(console, "embed", [str(config.data_dir), dest, "--backbone", EMBEDDER], shared)
    _print_command(console, "train", ["--dataset", "embeddings", "--data-dir", dest], {})

    small = override(config, SMALL)
    other = scratch_trainer(small, trainer.ranks)
    seconds = measure_speed(other).total(other)
    scale = min(1.0, LONG / seconds)
    # Down to one digit.
    unit = 10.0 ** math.floor(math.log10(scale))
    scale = float(f"{math.floor(scale / unit) * unit:.1g}")
    say(console, f"A small network on images of {SMALL['image_size']} pixels, about {duration(seconds * scale)}:")
    scaled: dict[str, object] = {} if scale == 1 else {"schedule_scale": scale * config.schedule_scale}
    # A folder of its own: in the usual one the run may have begun that takes too long.
    scaled |= {"run_dir": f"runs/{config.data_dir.name}-small"} if config.run_dir is None else {}
    _print_command(console, "train", ["--dataset", "folder"], chosen(small) | scaled)


def _print_command(console: Console, name: str, words: list[str], settings: dict[str, object]) -> None:
    for flag, value in settings.items():
        stage, _, inner = flag.replace("_", "-").rpartition(".")
        prefix = f"--{stage}." if stage else "--"
        if isinstance(value, bool):
            words.append(f"{prefix}{'' if value else 'no-'}{inner}")
        else:
            words += [prefix + inner, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    # In one piece, to be copied.
    console.print(f"  {as_called(name)} {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)
