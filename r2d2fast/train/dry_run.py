"""What a run would do: schedule, settings and where they are from, memory, and time measured in a few steps."""

from itertools import groupby

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from r2d2fast.data import ResidentImages
from r2d2fast.train.config import Config
from r2d2fast.train.data_summary import print_data
from r2d2fast.train.measure import duration, measure_speed, scratch_trainer
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import CHOSEN, flags, recipe_of
from r2d2fast.train.run_directory import OF_A_COMMAND, read_settings
from r2d2fast.train.scaling import SCALED, hanging, scaled_epochs
from r2d2fast.train.schedule import Epoch, batch_size
from r2d2fast.train.sooner import LONG, print_sooner
from r2d2fast.train.trainer import Trainer


def print_plan(config: Config, ranks: Ranks, console: Console) -> None:
    """Print what a run of ``config`` would do. The steps measured change a trainer that nobody keeps."""
    trainer = scratch_trainer(config, ranks)
    print_data(config, trainer.data, trainer.labels, console)
    _print_settings(config, console)
    _print_schedule(trainer, console)
    _print_memory(trainer, console)
    _print_time(trainer, console)


def _print_settings(config: Config, console: Console) -> None:
    recipe = recipe_of(config)
    derived = scaled_epochs(recipe.config, config.schedule_scale) | hanging(recipe.config, config)
    defaults = flags(recipe.config)
    held = {} if config.config is None else flags(read_settings(config.config))
    from_file = "" if config.config is None else config.config.name
    table = Table(title="settings, and where they are from")
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")  # and nothing is cut, however narrow the terminal
    for name, value in flags(config).items():
        if name in held and value == held[name] and name not in OF_A_COMMAND:
            table.add_row(_flag(name), _text(value), from_file)
        elif value != defaults[name] and name not in ("dry_run", "split"):
            table.add_row(_flag(name), _text(value), SCALED if value == derived.get(name) else CHOSEN)
        elif name in recipe.sources:
            table.add_row(_flag(name), _text(value), recipe.sources[name])
    console.print(table)


def _print_schedule(trainer: Trainer, console: Console) -> None:
    labelled = len(trainer.labelled)
    unlabelled = len(trainer.labels) - labelled
    table = Table(title=f"{trainer.config.dataset}, {labelled} labelled samples, {unlabelled} unlabelled")
    for heading in ("stage", "epochs", "before the first", "steps an epoch", "batch", "learning rate"):
        table.add_column(heading, justify="left" if heading == "before the first" else "right", overflow="fold")
    for _, group in groupby(_runs(trainer.schedule), key=lambda pair: pair[0]):
        epochs = [epoch for _, epoch in group]
        first, last = epochs[0], epochs[-1]
        start, end = (trainer.param_group(epoch, step)["lr"] for epoch, step in ((first, 0), (last, last.steps - 1)))
        table.add_row(
            str(first.stage),
            f"{first.epoch}-{last.epoch}",
            ("repredict" if first.repredicts else "predict") if first.predicts else "",
            str(first.steps),
            _batch(trainer.config, first.stage),
            f"{start:g}"
            if start == end
            else f"{start:.3g} to {end:.2g}" + ", cosine" * (first.cosine_epochs is not None),
            end_section=last.last,
        )
    console.print(table)


def _print_memory(trainer: Trainer, console: Console) -> None:
    parameters = list(trainer.model.parameters())
    network = sum(parameter.nbytes for parameter in parameters)
    kept_too = {"sgd": ", and for momentum", "adamw": ", and twice as much for AdamW's moments"}[
        trainer.config.optimizer
    ]
    if trainer.config.ema:
        kept_too += ", and once more for averaged weights"
    largest = max(batch_size(trainer.config, stage) for stage in trainer.config.stages) // trainer.ranks.count
    images = trainer.data.train
    kept = (
        f"kept on the device, {images.nbytes} bytes" if isinstance(images, ResidentImages) else "loaded batch by batch"
    )
    lines = (
        f"Images: {len(images)} of {' x '.join(map(str, images.shape))} to train on, {kept}.",
        f"Network: {sum(parameter.numel() for parameter in parameters)} parameters, {network} bytes; "
        f"as much again for gradients{kept_too}.",
        *trainer.method.memory(),
        f"Activations: about {_activation_bytes(trainer) * largest / 2**20:.1f} MiB for the {largest} images of a batch "
        "on each rank.",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _activation_bytes(trainer: Trainer) -> float:
    """What autograd keeps for the backward pass of one more image."""
    few = 2 * trainer.config.bn_groups
    # A difference, as parameters are kept, too, and under autocast copies of them.
    return (_kept_bytes(trainer, 2 * few) - _kept_bytes(trainer, few)) / few


def _kept_bytes(trainer: Trainer, batch: int) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.zeros(batch, *trainer.data.train.shape, device=trainer.ranks.device)
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.precision.autocast():
        logits = trainer.model(images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images)
    del logits
    return sum(kept.values())


def _print_time(trainer: Trainer, console: Console) -> None:
    speed = measure_speed(trainer)
    for stage, step in speed.steps.items():
        epochs = [epoch for epoch in trainer.schedule if epoch.stage == stage]
        seconds = speed.seconds(epochs, len(trainer.data.test), len(trainer.unlabelled))
        console.print(f"Stage {stage}: {1000 * step:.3g} ms a step, about {duration(seconds)}.", highlight=False)
    steps = sum(epoch.steps for epoch in trainer.schedule)
    total = speed.total(trainer)
    console.print(f"{len(trainer.schedule)} epochs, {steps} steps, about {duration(total)} in all.", highlight=False)
    if total > LONG and trainer.config.dataset == "folder" and trainer.ranks.device.type == "cpu":
        print_sooner(trainer, speed, console)


def _runs(schedule: list[Epoch]) -> list[tuple[int, Epoch]]:
    """Each epoch with the number of its run; a new one begins with a stage, a prediction, another learning rate or cosine."""
    number, numbered = 0, []
    for before, epoch in zip([None, *schedule], schedule, strict=False):
        if before is not None and (epoch.predicts or _lr(before) != _lr(epoch)):
            number += 1
        numbered.append((number, epoch))
    return numbered


def _lr(epoch: Epoch) -> tuple[int, float, int]:
    return epoch.stage, epoch.peak_lr, epoch.cosine_start


def _batch(config: Config, stage: int) -> str:
    two = config.stage2
    return f"{two.unlabelled_batch} + {two.labelled_batch}" if stage == 2 else str(batch_size(config, stage))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
