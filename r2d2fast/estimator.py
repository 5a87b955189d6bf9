"""R2-D2 as a scikit-learn estimator: labels for embeddings of which few are labelled, and a network that labels new ones."""

import copy
import numbers
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    assert_all_finite,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from torch import Tensor

from r2d2fast.data import Dataset, Embeddings, consecutive_batches
from r2d2fast.data.names import Numbers
from r2d2fast.train.callback import Callback
from r2d2fast.train.config import Config
from r2d2fast.train.embeddings_recipe import STAGE2_LR, fit_to_samples
from r2d2fast.train.errors import ConfigError, DivergenceError, TrainingError
from r2d2fast.train.evaluation import EVALUATION_BATCH
from r2d2fast.train.methods import R2D2
from r2d2fast.train.progress import Reporter
from r2d2fast.train.ranks import Ranks, resolve_device
from r2d2fast.train.recipes import RECIPES
from r2d2fast.train.schedule import Epoch
from r2d2fast.train.threads import cpu_threads
from r2d2fast.train.trainer import Trainer

_RECIPE = RECIPES["embeddings"].config


class R2D2Classifier(ClassifierMixin, BaseEstimator):
    """Semi-supervised classifier of embeddings by R2-D2 (Wang & Wu, AAAI 2020), for many samples of which few are labelled.

    A linear network or one with hidden layers learns the labelled samples by cross entropy (stage 1); then (stage 2) it and a
    pseudo-label of each unlabelled sample are learned together by the D2 loss, with all pseudo-labels predicted anew at times.
    It is what ``python -m r2d2fast.train --dataset embeddings`` runs, in memory. Where all samples are labelled it is stage 1.

    Features are standardised, and each sample is scaled to one length: direction is what tells embeddings of pretrained networks
    apart. The scaling is a part of the network; ``fit`` and ``predict`` take embeddings as they are. Data of one or two features,
    of which lengths are half, are not what this is for.

    Args:
        hidden_layer_sizes: width of each hidden layer; none, the default, is a linear classifier.
        alpha: weight of the class loss between predictions and pseudo-labels (paper: 0.1).
        beta: weight of the entropy of the predictions (paper: 0.03). Below ``alpha``.
        dropout: the share of the features that each batch leaves out, others every time; it stands for augmentation.
        learning_rate: of SGD with Nesterov momentum in stage 2; None, the default, takes 1 for a linear classifier and 0.3 with
            hidden layers, which at 1 can make all samples one class.
        weight_decay: L2 penalty on the weights in stage 1. In stage 2, where it harms if many samples are labelled, it is 10 / L
            times as large, with L the labelled samples a class, but no larger and at least a tenth.
        max_epochs: passes over the unlabelled samples in stage 2.
        batch_size: samples of a batch in stage 2, unlabelled and labelled ones; of fewer samples batches are smaller.
        random_state: seed, ``RandomState`` or None. The same seed gives the same bits on the same machine. The global generators
            of PyTorch are left as they are.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        cuda_graphs: take whole steps, batches and optimizer included, as CUDA graphs: worth it for steps as short as a linear
            classifier's. The bits are the same. It needs a GPU with bfloat16, and is off by default, as no GPU has run it yet.
        verbose: 1 shows progress.

    Attributes:
        classes_: the N classes, sorted.
        n_features_in_: D.
        transduction_: ``[M]``, the class of every sample of ``fit``: the given one of a labelled sample, else the predicted one.
        label_distributions_: float32 ``[M, N]``, the probabilities of the classes for every sample of ``fit``. The array is put
            together at each access.
        history_: a dictionary for each epoch: ``stage``, ``epoch``, ``lr``, ``train_loss``, ``seconds`` and, in stage 2,
            ``prediction_confidence``, ``pseudo_confidence``, ``agreement`` and so on, as in ``metrics.jsonl`` of a run.

    Example:
        >>> from r2d2fast import R2D2Classifier
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> few = [label if number < 50 else -1 for number, label in enumerate(y)]
        >>> labels = R2D2Classifier(random_state=0).fit(X, few).transduction_
    """

    classes_: np.ndarray
    n_features_in_: int
    transduction_: np.ndarray
    history_: list[dict[str, Any]]

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (),
        *,
        alpha: float = _RECIPE.alpha,
        beta: float = _RECIPE.beta,
        dropout: float = _RECIPE.dropout,
        learning_rate: float | None = None,
        weight_decay: float = _RECIPE.weight_decay,
        max_epochs: int = _RECIPE.stage2.epochs,
        batch_size: int = _RECIPE.stage2.unlabelled_batch + _RECIPE.stage2.labelled_batch,
        random_state: Any = None,
        device: str = "auto",
        cuda_graphs: bool = False,
        verbose: int = 0,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.alpha = alpha
        self.beta = beta
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.cuda_graphs = cuda_graphs
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "R2D2Classifier":
        """Learn from labelled and unlabelled samples together.

        After Ctrl-C, which is warned of, the estimator is what has been learned up to then.

        Args:
            X: float16, float32 or float64 ``[M, D]``, an array (perhaps a mapped one, ``numpy.load(file, mmap_mode="r")``), a
                tensor on any device, or what NumPy makes an array of. It is not copied, whatever its type.
            y: ``[M]``, the classes, integers or strings; −1 where a sample is unlabelled, as everywhere in
                ``sklearn.semi_supervised``. NumPy turns −1 among strings into ``"-1"``, which counts as −1, as do None,
                NaN and pandas' NA in an array of objects.

        Raises:
            ValueError: no label, labels of one class only, X with NaN or infinity, another length of y, a parameter out of
                range, or ``cuda_graphs`` without a GPU that has bfloat16.
            RuntimeError: the network has diverged, or a step cannot be captured as a CUDA graph.
        """
        self._check_parameters()
        device = _device(self.device)
        rows = self._validated(X, reset=True)
        if y is None:
            raise ValueError("R2D2Classifier requires y to be passed, but the target y is None")
        check_consistent_length(rows, y)
        classes, labels = _encode(y)
        data = Dataset(
            Embeddings(rows, device),
            Embeddings(torch.empty(0, rows.shape[1]), device),
            labels,
            torch.empty(0, dtype=torch.int64),
            [str(name) for name in classes],
            Numbers(len(labels)),
        )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        gpu = [device] if device.type == "cuda" else []
        with torch.cuda.device(device) if gpu else nullcontext(), torch.random.fork_rng(gpu):
            try:
                trainer = Trainer(self._config(labels, len(classes), seed), data, labels, Ranks(device=device))
            except ConfigError as error:
                raise ValueError(str(error).replace("--cuda-graphs", "cuda_graphs")) from error
            self._train(trainer)
            with cpu_threads(trainer.threads):
                unlabelled, probabilities = _predict_unlabelled(trainer)
            if trainer.captured is not None:
                trainer.captured.restart()  # the graphs' memory, which a cycle of references would keep
        numbers = labels.clone()
        numbers[unlabelled] = probabilities.argmax(1)
        # All at once, in the end: until then a second Ctrl-C or an error leaves what an earlier fit has learned.
        self.classes_ = classes
        self.transduction_ = classes[numbers.numpy()]
        self.history_ = [
            {name: value for name, value in row.items() if name not in ("test_error", "bad_images")}
            for row in trainer.history
        ]
        self._network = copy.deepcopy(trainer.evaluator.model).cpu().eval()
        self._of_unlabelled = unlabelled, probabilities
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The classes of new samples: ``[T]``, for X as in :meth:`fit`."""
        numbers = [logits.argmax(1) for logits in self._logits(X)]
        return self.classes_[torch.cat(numbers).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of the classes, in the order of ``classes_``: float64 ``[T, N]``."""
        return torch.cat([logits.softmax(1) for logits in self._logits(X)]).numpy()

    @property
    def label_distributions_(self) -> np.ndarray:
        """See the class."""
        check_is_fitted(self)
        unlabelled, probabilities = self._of_unlabelled
        everything = np.zeros((len(self.transduction_), len(self.classes_)), np.float32)
        everything[np.arange(len(everything)), np.searchsorted(self.classes_, self.transduction_)] = 1
        everything[unlabelled.numpy()] = probabilities.numpy()
        return everything

    def _train(self, trainer: Trainer) -> None:
        with ExitStack() as context:
            if self.verbose:
                reporter = context.enter_context(Reporter(Console(), trainer.schedule, done=0))
                trainer.callback = _Progress(reporter)
            try:
                trainer.fit()
            except KeyboardInterrupt:
                done, planned = trainer.position.epoch, len(trainer.schedule)
                warnings.warn(
                    f"interrupted after {done} of {planned} epochs; the estimator is what it has learned up to then",
                    stacklevel=3,
                )
            except DivergenceError as error:
                raise RuntimeError(f"{error} Here: lower learning_rate, which is {self._learning_rate():g}") from error
            except TrainingError as error:  # a step that cannot be captured
                raise RuntimeError(str(error)) from error

    @torch.no_grad()
    def _logits(self, X: Any) -> Sequence[Tensor]:
        """float64 ``[b, N]``, on the CPU, batch by batch."""
        check_is_fitted(self)
        device = _device(self.device)
        part = Embeddings(self._validated(X, reset=False), device)
        network = copy.deepcopy(self._network).to(device, torch.float64)
        order = consecutive_batches(torch.arange(len(part)), EVALUATION_BATCH)
        return [network(rows.double()).cpu() for rows in part.batches(order, None, 0)]

    def _validated(self, X: Any, reset: bool) -> Tensor | np.ndarray:
        """X, not copied, with as many features as the other times; numbers that are not finite ``Embeddings`` finds."""
        if isinstance(X, Tensor):
            if X.ndim != 2 or 0 in X.shape:
                raise ValueError(f"X is a tensor of shape {list(X.shape)}; accepted: [M, D], both at least 1")
            validate_data(self, X, reset=reset, skip_check_array=True)
            return X if X.is_floating_point() else X.float()
        accepted = [np.float32, np.float64, np.float16]  # others become the first
        return validate_data(self, X, reset=reset, dtype=accepted, ensure_all_finite=False)

    def _check_parameters(self) -> None:
        for name in ("alpha", "beta", "learning_rate", "weight_decay"):
            if name == "learning_rate" and self.learning_rate is None:
                continue
            self._require(name, numbers.Real, lambda value: 0 <= value < 1e30, "0 or more")
        self._require("dropout", numbers.Real, lambda value: 0 <= value < 1, "0 to below 1")
        self._require("max_epochs", numbers.Integral, lambda value: value >= 1, "a whole number of 1 or more")
        self._require("batch_size", numbers.Integral, lambda value: value >= 4, "a whole number of 4 or more")
        self._require(
            "hidden_layer_sizes",
            Sequence,
            lambda sizes: all(isinstance(size, numbers.Integral) and int(size) >= 1 for size in sizes),
            "a tuple or list of whole numbers above 0, () for a linear classifier",
        )

    def _learning_rate(self) -> float:
        if self.learning_rate is None:
            return STAGE2_LR[self._backbone()]
        return self.learning_rate

    def _backbone(self) -> str:
        return "mlp" if len(self.hidden_layer_sizes) else "linear"

    def _require(self, name: str, kind: type, good: Callable[[Any], bool], accepted: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or not good(value):
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}")

    def _config(self, labels: Tensor, num_classes: int, seed: int) -> Config:
        """The recipe for embeddings, with this estimator's parameters, for so many samples."""
        labelled = int((labels >= 0).sum())
        two = _RECIPE.stage2
        usual = two.unlabelled_batch + two.labelled_batch
        labelled_batch = max(round(self.batch_size * two.labelled_batch / usual), 1)
        wanted = replace(
            _RECIPE,
            stage2=replace(
                two,
                epochs=self.max_epochs,
                unlabelled_batch=self.batch_size - labelled_batch,
                labelled_batch=labelled_batch,
                lrs=(self._learning_rate(),) * len(two.lrs),
            ),
            label_lr=_RECIPE.label_lr * self.batch_size / usual,
            seed=seed,
            backbone=self._backbone(),
            hidden_layer_sizes=tuple(self.hidden_layer_sizes),
            alpha=self.alpha,
            beta=self.beta,
            dropout=self.dropout,
            weight_decay=self.weight_decay,
            cuda_graphs=bool(self.cuda_graphs),
        )
        return fit_to_samples(wanted, labelled, len(labels) - labelled, num_classes)


class _Progress(Callback):
    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def between_steps(self, trainer: Trainer) -> None:
        self.reporter.stepped(trainer.position.step)

    def epoch_ended(self, trainer: Trainer, epoch: Epoch, metrics: dict[str, Any]) -> None:
        self.reporter.epoch_ended(epoch, metrics)


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except ConfigError as error:
        raise ValueError(str(error).replace("--device", "device is")) from error


def _encode(y: Any) -> tuple[np.ndarray, Tensor]:
    """The classes ``[N]``, sorted, and the number of each sample's one, int64 ``[M]``, −1 where it is unlabelled."""
    y = column_or_1d(y.detach().cpu().numpy() if isinstance(y, Tensor) else y, warn=True)
    if y.dtype.kind == "f":
        assert_all_finite(y, input_name="y")
    if y.dtype.kind == "O":
        unlabelled = np.array([_is_missing(value) or value in (-1, "-1") for value in y], bool)
    else:
        unlabelled = y == ("-1" if y.dtype.kind == "U" else -1)
    if unlabelled.all():
        raise ValueError("y labels no sample: all are -1; label some samples of each class")
    given = y[~unlabelled]
    if y.dtype.kind == "O":
        given = np.asarray(given.tolist())
    check_classification_targets(given)
    classes, numbers = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class only, {classes[0]!r}: samples of 2 classes or more have to be labelled, the others are -1"
        )
    labels = torch.full((len(y),), -1)
    labels[torch.from_numpy(~unlabelled)] = torch.from_numpy(numbers)
    return classes, labels


def _is_missing(value: Any) -> bool:
    """None, and what pandas makes of it: NaN, which does not equal itself, or NA, of which no comparison is true or false."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True


@torch.no_grad()
def _predict_unlabelled(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """The numbers of the unlabelled samples, int64 ``[U]``, and the network's probabilities for them, float32 ``[U, N]``.

    In the memory of the bank, which may be as large as all others together and is needed no more.
    """
    assert isinstance(trainer.method, R2D2)
    samples, rows = trainer.ownership.samples, trainer.method.bank.pseudo_logits
    done = 0
    for index, logits in trainer.evaluator.logits(trainer.data.train, samples):
        rows[done : done + len(index)] = logits.softmax(1)
        done += len(index)
    return samples, rows.cpu()
