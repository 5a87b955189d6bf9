"""``python -m bench.embeddings``: R2D2Classifier against scikit-learn's estimators on the same embeddings.

Each estimator is fitted in a process of its own, one after the other, so that its peak memory is its own.
"""

import json as json_format
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from bench.memory import process_memory
from bench.table import machine_list, verdict
from r2d2fast import machine
from r2d2fast.data import split_labels
from r2d2fast.tables import markdown_table, mean_std

OURS = "R2D2Classifier"
FEATURE_LENGTH = 10.0
TARGET_SHAPE = (50_000, 1280)
MOST_SECONDS, MOST_MEMORY, FASTER_THAN_LABEL_SPREADING = 30.0, 300e6, 8.0
"""The project's own targets for arrays of TARGET_SHAPE and 10 classes: seconds of a fit, bytes beside X, a ratio of seconds."""


def _scaled(estimator: Any) -> Any:
    """What R2D2Classifier does by itself: features are standardised, and each sample is scaled to one length."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

    lengthen = FunctionTransformer(lambda x: FEATURE_LENGTH * x)
    return make_pipeline(StandardScaler(), Normalizer(), lengthen, estimator)


def _logistic_regression(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, max_iter=1000, random_state=seed)


def _self_training(seed: int) -> Any:
    from sklearn.semi_supervised import SelfTrainingClassifier

    return _scaled(SelfTrainingClassifier(_logistic_regression(seed), threshold=0.8))


def _label_spreading(seed: int) -> Any:
    from sklearn.semi_supervised import LabelSpreading

    return _scaled(LabelSpreading(kernel="knn", n_neighbors=20))


def _r2d2(seed: int, **parameters: Any) -> Any:
    from r2d2fast import R2D2Classifier

    return R2D2Classifier(random_state=seed, **parameters)


# Imports are within the functions: a process must not be charged for the libraries of another's estimator.
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    OURS: _r2d2,
    f"{OURS}, one hidden layer of 256": lambda seed: _r2d2(seed, hidden_layer_sizes=(256,)),
    "LogisticRegression": lambda seed: _scaled(_logistic_regression(seed)),
    "SelfTrainingClassifier": _self_training,
    "LabelSpreading": _label_spreading,
}
LABELLED_ONLY = {"LogisticRegression"}
"""Estimators that take no unlabelled samples."""


@dataclass(frozen=True)
class Fit:
    """What one fit came to; errors in percent, times in seconds, memory in bytes beyond that of the process with its imports."""

    estimator: str
    labels: int
    seed: int
    test_error: float
    unlabelled_error: float
    seconds: float
    processor_seconds: float
    memory: int


def fit_here(folder: Path, estimator: str, labels: int, seed: int) -> Fit:
    """Fit one estimator. Call it once in a fresh process, because the peak of a process never falls.

    Raises ValueError where the classes have not enough samples for ``labels``.
    """
    model = ESTIMATORS[estimator](seed)
    before = process_memory("VmRSS")
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("train", "train_labels", "test", "test_labels")}
    truth = torch.from_numpy(arrays["train_labels"].astype(np.int64))
    y = split_labels(truth, int(truth.max()) + 1, labels, split=seed).numpy()
    unlabelled = y < 0
    began, processor = time.perf_counter(), time.process_time()
    if estimator in LABELLED_ONLY:
        # Features are scaled by all samples: by forty alone the error of LogisticRegression is three points larger.
        scaled = model[:-1].fit_transform(arrays["train"])
        model[-1].fit(scaled[~unlabelled], y[~unlabelled])
    else:
        model.fit(arrays["train"], y)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    memory = process_memory("VmHWM") - before
    last = model[-1] if hasattr(model, "steps") else model
    classes = getattr(last, "transduction_", y)
    if (classes < 0).any():  # of samples that were not given, or that SelfTrainingClassifier was never sure of
        classes = np.where(classes < 0, model.predict(arrays["train"]), classes)
    test_error = 100 * float(np.mean(model.predict(arrays["test"]) != arrays["test_labels"]))
    unlabelled_error = 100 * float(np.mean((classes != arrays["train_labels"])[unlabelled]))
    return Fit(estimator, labels, seed, test_error, unlabelled_error, seconds, processor, memory)


def fit(folder: Path, estimator: str, labels: int, seed: int, threads: int) -> Fit:
    """``fit_here`` in a process of its own. Raises RuntimeError, with what it said last or its signal, where it fails."""
    arguments = f"Path({str(folder.resolve())!r}), {estimator!r}, {labels}, {seed}"
    program = (
        "import json; from dataclasses import asdict; from pathlib import Path; from bench.embeddings import fit_here; "
        f"print(json.dumps(asdict(fit_here({arguments}))))"
    )
    environment = os.environ | {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
        if done.returncode < 0:
            reason = f"ended by {signal.Signals(-done.returncode).name}"
            if done.returncode == -signal.SIGKILL:
                reason += (
                    ", as the system does where memory runs out; leave it out by --estimators, or free some memory"
                )
        raise RuntimeError(f"{estimator}, {labels} labels, seed {seed}: {reason}")
    return Fit(**json_format.loads(done.stdout.splitlines()[-1]))


def table(fits: Sequence[Fit], features: int) -> str:
    """A row for each number of labels and estimator; ``features``: bytes of X."""
    rows = []
    for labels, estimator in dict.fromkeys((one.labels, one.estimator) for one in fits):
        group = [one for one in fits if (one.labels, one.estimator) == (labels, estimator)]
        rows.append(
            (
                str(labels),
                estimator,
                mean_std([one.test_error for one in group]),
                mean_std([one.unlabelled_error for one in group]),
                mean_std([one.seconds for one in group], digits=1),
                mean_std([one.processor_seconds for one in group], digits=1),
                f"{(max(one.memory for one in group) - features) / 1e6:.0f}",
            )
        )
    header = ("labels", "estimator", "test error (%)", "error on the unlabelled (%)", "seconds", "processor seconds")
    return markdown_table((*header, "most memory beside X (MB)"), rows)


def targets(fits: Sequence[Fit], features: int) -> str:
    """The project's targets for our slowest and largest fit, against the fastest one of LabelSpreading."""
    ours = [one for one in fits if one.estimator == OURS]
    spreading = [one.seconds for one in fits if one.estimator == "LabelSpreading"]
    slowest, memory = max(one.seconds for one in ours), max(one.memory for one in ours) - features
    rows = [
        ("seconds of a fit", f"{slowest:.1f}", f"≤ {MOST_SECONDS:.0f}", verdict(slowest <= MOST_SECONDS)),
        ("MB beside X", f"{memory / 1e6:.0f}", f"≤ {MOST_MEMORY / 1e6:.0f}", verdict(memory <= MOST_MEMORY)),
    ]
    if spreading:
        ratio = min(spreading) / slowest
        target = FASTER_THAN_LABEL_SPREADING
        rows.append(("times as fast as LabelSpreading", f"{ratio:.1f}", f"≥ {target:.0f}", verdict(ratio >= target)))
    return markdown_table((OURS, "", "target", ""), rows)


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    labels: tuple[int, ...] = (40, 250, 4000),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    estimators: tuple[str, ...] = tuple(ESTIMATORS),
    threads: int = 1,
    json: Path | None = None,
) -> None:
    """R2D2Classifier against scikit-learn's estimators on the same embeddings: error, time and peak memory.

    Args:
        folder: A folder with train.npy, train_labels.npy, test.npy and test_labels.npy. The labels are the true ones of all
            samples; all but a few, as many of each class, are hidden from the estimators.
        labels: Numbers of labelled samples.
        seeds: Seeds of the estimators, and of the draw of the labelled samples.
        estimators: Estimators to fit, by the names of the table.
        threads: Threads of each process.
        json: A file to which every fit is written as well.
    """
    unknown = [name for name in estimators if name not in ESTIMATORS]
    if unknown:
        raise SystemExit(f"--estimators {unknown[0]}: unknown; accepted: {'; '.join(ESTIMATORS)}")
    about = machine.describe()
    x = np.load(folder / "train.npy", mmap_mode="r")
    fits = []
    for count in labels:
        for name in estimators:
            for seed in seeds:
                fits.append(fit(folder, name, count, seed, threads))
                print(fits[-1], file=sys.stderr, flush=True)
    print(machine_list(about), end="\n\n")
    print(f"{x.shape[0]} x {x.shape[1]} {x.dtype}, {x.nbytes / 1e6:.0f} MB; {threads} threads.", end="\n\n")
    print(table(fits, x.nbytes))
    if x.shape == TARGET_SHAPE and OURS in estimators:
        print(f"\n{targets(fits, x.nbytes)}")
    if json:
        json.write_text(json_format.dumps({"machine": about, "fits": [asdict(one) for one in fits]}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.embeddings", config=(tyro.conf.FlagCreatePairsOff,))
