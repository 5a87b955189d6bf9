"""The command line: ``python -m r2d2fast.predict``."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from torchvision.datasets.folder import IMG_EXTENSIONS

from r2d2fast.command import as_called
from r2d2fast.data import DataError, LoaderError
from r2d2fast.data.embeddings import embedding_files, read_embedding_file
from r2d2fast.data.label_file import LABEL_FILE, read_labels
from r2d2fast.files import replacing
from r2d2fast.help_texts import description, with_help_texts
from r2d2fast.predict.inputs import Inputs, paths_in
from r2d2fast.predict.trained_run import Predictions, RunError, load_run
from r2d2fast.tables import counted, csv_rows, probability
from r2d2fast.train.errors import TrainingError

PROGRAM = as_called("predict")
HEADER = ("name", "class", "probability")
# Bad images that are named; all are counted, and have a row without a class.
NAMED = 20


@with_help_texts
@dataclass(frozen=True)
class Arguments:
    """Print the class of each image or embedding, found by the network of a finished run: lines of name, class and probability,
    as CSV.

    Images are decoded, resized and normalised as in the run. Where their classes are known, from the folders that they are in, a
    labels.txt, or PART_labels.npy beside PART.npy, the error is printed, too. Exit status 0: done; 1: it cannot be done; 2: no
    such flag."""

    run: Annotated[Path, tyro.conf.Positional]
    """The directory of a finished run, or its network.safetensors."""

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders, of which all images are taken; for a run on embeddings, their files or folders."""

    out: Path | None = None
    """The file to write, instead of standard output. It is there when all of it is."""

    device: str = "auto"
    """The device to compute on: cpu, cuda, cuda:1 and so on; auto is cuda if there is one, else cpu."""

    workers: int = 0
    """Number of processes that load photographs; with 0 this one does it itself."""


def main(arguments: list[str] | None = None) -> int:
    """Predict as the command line (default: the process's) says; the exit status."""
    chosen = tyro.cli(Arguments, args=arguments, prog=PROGRAM, description=description(Arguments))
    try:
        return _predict(chosen)
    except (RunError, DataError, LoaderError, TrainingError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read has read enough; what Python would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{PROGRAM}: cannot write {chosen.out or 'standard output'}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 1


def _predict(chosen: Arguments) -> int:
    if chosen.workers < 0:
        raise ValueError(f"--workers {chosen.workers}: must be at least 0")
    run = load_run(chosen.run, chosen.device)
    embeddings = run.preprocessing.kind == "embeddings"
    inputs, classes = (find_embeddings if embeddings else find_images)(chosen.source, run.class_names)
    console = Console(stderr=True)
    known = wrong = done = 0
    bad_images: dict[str, str] = {}
    with ExitStack() as stack:
        write: Callable[[bytes], object] = sys.stdout.buffer.write
        if chosen.out is not None:
            write = stack.enter_context(replacing(chosen.out)).write
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        task = progress.add_task("predicting", total=len(classes))
        write(csv_rows([HEADER]))
        for one in inputs:
            images, names = run.open(one, "skip", chosen.workers)
            first = done
            for part in run.batches(images, names):
                true_classes = np.array(classes[done : done + len(part.names)])
                counts = (true_classes >= 0) & (part.classes >= 0)
                known, wrong = known + int(counts.sum()), wrong + int((part.classes != true_classes)[counts].sum())
                write(csv_rows(_rows(names[done - first : done - first + len(part.names)], part)))
                done += len(part.names)
                progress.update(task, completed=done)
            bad_images |= images.bad_images
        sys.stdout.flush()
    _print_end(bad_images, known, wrong, len(classes), chosen.out, console)
    return 0


def find_embeddings(sources: Sequence[Path], class_names: Sequence[str]) -> tuple[list[Inputs], Sequence[int]]:
    """The files of embeddings that ``sources`` name, and the number of each row's class: −1 where nobody knows it.

    Classes are known where a file of labels lies beside that of the rows. Raises DataError for a source that is not there, or no
    source at all.
    """
    paths = [path for source in sources for path in embedding_files(source)]
    if not paths:
        raise DataError("no SOURCE; name .npy or .safetensors files of embeddings, or folders of them")
    numbers = {name: number for number, name in enumerate(class_names)}
    classes = []
    for file in map(read_embedding_file, paths):
        own = np.array([*(numbers.get(name, -1) for name in file.class_names), -1])
        classes.append(own[file.labels.numpy()])  # −1 takes the last
    return list(paths), np.concatenate(classes)  # type: ignore[return-value]


def find_images(sources: Sequence[Path], class_names: Sequence[str]) -> tuple[list[Inputs], Sequence[int]]:
    """The images that ``sources`` name, as one input, and the number of each one's class: −1 where nobody knows it.

    In a folder it is that of the image's line in ``labels.txt``, or the name of the folder in which the image is. Raises
    DataError for a source that is not there, a folder without an image, no source at all.
    """
    paths: list[str] = []
    classes: list[int] = []
    numbers = {name: number for number, name in enumerate(class_names)}
    for source in sources:
        if not source.is_dir():
            if not source.exists():
                raise DataError(f"{source}: no such file or folder; name image files, or folders of them")
            paths.append(str(source))
            classes.append(-1)
            continue
        found = paths_in(source)
        if not found:
            raise DataError(f"{source} has no images; their names end in {' '.join(IMG_EXTENSIONS)}")
        names = [Path(path).relative_to(source).as_posix() for path in found]
        labels = read_labels(source / LABEL_FILE, names, missing_ok=True) if (source / LABEL_FILE).is_file() else None
        for name in names:
            label = name.rpartition("/")[0].partition("/")[0] if labels is None else labels.get(name)
            classes.append(-1 if label is None else numbers.get(label, -1))
        paths += found
    if not paths:
        raise DataError("no SOURCE; name image files, or folders of them")
    return [paths], classes


def _rows(names: Sequence[str], part: Predictions) -> Iterator[tuple[str, str, str]]:
    for name, class_name, row in zip(names, part.names, part.probabilities, strict=True):
        value = float(row.max())
        yield name, class_name, "" if math.isnan(value) else probability(value)


def _print_end(bad: Mapping[str, str], known: int, wrong: int, count: int, out: Path | None, console: Console) -> None:
    lines = [f"{name}: {reason}" for name, reason in islice(bad.items(), NAMED)]
    if len(bad) > NAMED:
        lines.append(f"and {len(bad) - NAMED} more")
    if bad:
        lines.append(f"{counted(len(bad), 'image')} of {count} could not be used and got no class")
    if known:
        lines.append(
            f"error {100 * wrong / known:.2f} %: {wrong} of the {counted(known, 'image')} whose class is known"
        )
    if out is not None:
        lines.append(f"{counted(count, 'row')} in {out}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
