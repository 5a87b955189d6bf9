"""The schedule as a table, and the memory it needs."""

from itertools import groupby

from rich.console import Console
from rich.table import Table

from r2d2fast.train.config import Config
from r2d2fast.train.schedule import Epoch
from r2d2fast.train.trainer import Trainer


def print_plan(trainer: Trainer, console: Console) -> None:
    """Print what a run would do: the schedule, equal epochs in one line, and the bytes of network and bank."""
    labelled, unlabelled = len(trainer.labelled), len(trainer.unlabelled)
    table = Table(title=f"{trainer.config.dataset}, {labelled} labelled samples, {unlabelled} unlabelled")
    for heading in ("stage", "epochs", "before the first", "steps an epoch", "batch", "learning rate"):
        table.add_column(heading, justify="left" if heading == "before the first" else "right")
    for _, group in groupby(_runs(trainer.schedule), key=lambda pair: pair[0]):
        epochs = [epoch for _, epoch in group]
        first, last = epochs[0], epochs[-1]
        start, end = first.lr(0), last.lr(last.steps - 1)
        table.add_row(
            str(first.stage),
            f"{first.epoch}-{last.epoch}",
            ("repredict" if first.repredicts else "predict") if first.predicts else "",
            str(first.steps),
            _batch(trainer.config, first.stage),
            f"{start:g}" if start == end else f"{start:g} to {end:.2g}, cosine",
            end_section=last.last,
        )
    console.print(table)
    steps = sum(epoch.steps for epoch in trainer.schedule)
    parameters = list(trainer.model.parameters())
    network = sum(parameter.nbytes for parameter in parameters)
    console.print(
        f"{len(trainer.schedule)} epochs, {steps} steps. "
        f"Network: {sum(parameter.numel() for parameter in parameters)} parameters, {network} bytes. "
        f"Bank: {unlabelled} x {trainer.data.num_classes} pseudo-logits, {trainer.bank.nbytes} bytes.",
        highlight=False,
    )


def _runs(schedule: list[Epoch]) -> list[tuple[int, Epoch]]:
    """Each epoch with the number of its run; a new one begins with a stage, a prediction or another learning rate."""
    number, numbered = 0, []
    for before, epoch in zip([None, *schedule], schedule, strict=False):
        if before is not None and (epoch.predicts or (before.stage, before.peak_lr) != (epoch.stage, epoch.peak_lr)):
            number += 1
        numbered.append((number, epoch))
    return numbered


def _batch(config: Config, stage: int) -> str:
    if stage == 2:
        return f"{config.stage2.unlabelled_batch} + {config.stage2.labelled_batch}"
    return str(config.stage1.batch if stage == 1 else config.stage3.batch)
