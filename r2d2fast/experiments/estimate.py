"""The dry run: which runs there would be, and how long they would take, from a few measured steps of each network."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from r2d2fast.experiments.runs import Run
from r2d2fast.train.checks import check_schedule
from r2d2fast.train.config import Config
from r2d2fast.train.load_data import labels_of
from r2d2fast.train.measure import Speed, duration, measure_speed, scratch_trainer
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.run_directory import CONFIG, RESULTS
from r2d2fast.train.schedule import make_schedule
from r2d2fast.train.trainer import Trainer


def print_estimate(directory: Path, base: Config, runs: list[Run], ranks: Ranks, console: Console) -> float:
    """Print the runs of one data set with the time that each takes. Returns the seconds that the unfinished ones take.

    ``base`` is what they have in common, ``directory`` where they all are. Raises ConfigError where one of them cannot be.
    """
    table = Table(title=f"{len(runs)} runs with {base.dataset}, in {directory}")
    for heading in ("run", "stages", "epochs", "steps", "time", ""):
        table.add_column(heading, justify="left" if heading in ("run", "") else "right")
    measured: dict[tuple[str, str], tuple[Trainer, Speed]] = {}
    left = 0.0
    for run in runs:
        config = run.config
        key = config.backbone, config.method
        if key not in measured:
            every_stage = replace(
                base, backbone=config.backbone, stages=(1, 2, 3), seed=config.seed, split=config.split
            )
            trainer = scratch_trainer(every_stage if config.method == "r2d2" else config, ranks)
            measured[key] = trainer, measure_speed(trainer)
        trainer, speed = measured[key]
        labels = labels_of(config, trainer.data)  # of a variant with all labels others than those measured with
        labelled = int((labels >= 0).sum())
        unlabelled = len(labels) - labelled
        check_schedule(config, labelled, unlabelled, ranks.count)
        test = len(trainer.data.test)
        epochs = make_schedule(config, labelled, unlabelled, ranks.count, test)
        seconds = speed.seconds(epochs, test, unlabelled)
        finished = (run.directory / RESULTS).exists()
        left += 0 if finished else seconds
        table.add_row(
            str(run.directory.relative_to(directory)),
            ",".join(map(str, config.stages)),
            str(len(epochs)),
            str(sum(epoch.steps for epoch in epochs)),
            duration(seconds),
            "finished" if finished else "begun" if (run.directory / CONFIG).exists() else "",
        )
    console.print(table)
    return left
