"""The network of a finished run, with all that it takes to ask it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from r2d2fast.command import as_called
from r2d2fast.data import Images, Preprocessing
from r2d2fast.image_options import OnBadImage
from r2d2fast.models import load_pretrained, make_model
from r2d2fast.predict.inputs import Inputs, open_inputs
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.evaluation import EVALUATION_BATCH, Evaluator, most_probable
from r2d2fast.train.precision import Precision
from r2d2fast.train.ranks import Ranks, resolve_device
from r2d2fast.train.run_directory import NETWORK
from r2d2fast.train.threads import choose_threads, cpu_threads


class RunError(ValueError):
    """A run that cannot be asked: it is not finished, or its network is damaged; the message names the file and the way out."""


@dataclass(frozen=True)
class Predictions:
    """What a network says of n samples, in their order.

    Attributes:
        classes: int64 ``[n]``, the number of the most probable class; −1 for a bad image.
        names: the name of that class; empty for a bad image.
        probabilities: float32 ``[n, N]``, softmax; NaN for a bad image.
        bad_images: why, by name, of the images that could not be used.
    """

    classes: np.ndarray
    names: list[str]
    probabilities: np.ndarray
    bad_images: Mapping[str, str]


class TrainedRun:
    """The network of a run, in eval mode; :func:`load_run` makes one.

    Attributes:
        class_names: N names.
        preprocessing: what becomes of its inputs.
        model: the network: logits ``[B, N]``.
        device: where it computes.
        threads: with so many on a CPU.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
        self.class_names: list[str] = json.loads(about["classes"])
        self.preprocessing = Preprocessing.from_json(about["preprocessing"])
        self.device = device
        # Initial values are drawn, and overwritten: the caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]):
            model = make_model(about["backbone"], **json.loads(about["arguments"]))
        load_pretrained(model, path)
        self.model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.threads = torch.get_num_threads()
        if device.type == "cpu":
            self.threads = choose_threads(self.model, self.preprocessing.shape, EVALUATION_BATCH)
        precision = Precision(about["precision"], device)
        self._evaluator = Evaluator(self.model, precision, Ranks(device=device), lambda: None)

    def predict(self, inputs: Inputs, *, on_bad_image: OnBadImage = "error", workers: int = 0) -> Predictions:
        """The classes of images, decoded, resized and normalised as the run did in its own evaluation.

        Args:
            inputs: image files, by their paths or that of a folder, of which all are taken, sorted by name; or pixels as the run
                had them, 0 to 255 but for scikit-learn's digits, 0 to 16: uint8 arrays ``[B, H, W]`` or ``[B, H, W, C]``, uint8
                tensors ``[B, C, H, W]``, or a sequence of single ones, which may differ in size. Of a run on embeddings: a float
                array or tensor ``[B, D]``, or the path of a ``.npy`` or ``.safetensors`` file.
            on_bad_image: ``"error"``, or ``"skip"``: an image that cannot be used has no class, and is named in ``bad_images``.
            workers: processes that load photographs; 0: this one.

        Raises:
            BadImageError (a ``DataError``): an image cannot be used, and ``on_bad_image`` is ``"error"``.
            ValueError, TypeError: inputs of another kind.
        """
        images, names = self.open(inputs, on_bad_image, workers)
        parts = list(self.batches(images, names))
        return Predictions(
            np.concatenate([np.empty(0, np.int64), *(part.classes for part in parts)]),
            [name for part in parts for name in part.names],
            np.concatenate([np.empty((0, len(self.class_names)), np.float32), *(part.probabilities for part in parts)]),
            dict(images.bad_images),
        )

    def open(self, inputs: Inputs, on_bad_image: OnBadImage, workers: int) -> tuple[Images, Sequence[str]]:
        """``inputs`` for :meth:`batches`, and their names; arguments and errors as of :meth:`predict`."""
        return open_inputs(self.preprocessing, inputs, self.device, on_bad_image, workers)

    def batches(self, images: Images, names: Sequence[str]) -> Iterator[Predictions]:
        """The predictions of each batch, one after the other, in memory that does not grow with their number."""
        logits_of_batches = self._evaluator.logits(images, torch.arange(len(images)))
        while True:
            with cpu_threads(self.threads):  # and the caller's own between batches
                batch = next(logits_of_batches, None)
            if batch is None:
                return
            samples, logits = batch
            classes = most_probable(logits)[0].cpu().numpy()
            probabilities = logits.softmax(1).cpu().numpy()
            found: dict[str, str] = {}
            for place, sample in enumerate(samples.tolist() if images.bad_images else ()):
                if names[sample] in images.bad_images:
                    found[names[sample]] = images.bad_images[names[sample]]
                    classes[place], probabilities[place] = -1, np.nan
            yield Predictions(
                classes,
                ["" if number < 0 else self.class_names[number] for number in classes.tolist()],
                probabilities,
                found,
            )


def load_run(run: str | Path, device: str = "auto") -> TrainedRun:
    """The network of a finished run, ready to predict.

    Args:
        run: the run's directory, or the file ``network.safetensors`` of it, which suffices.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` and so on; ``"auto"``: a GPU if there is one.

    Raises:
        RunError: there is no network, the file is damaged or of another program, or there is no such device.

    >>> import r2d2fast
    >>> run = r2d2fast.load_run("runs/fashion-mnist-labels1000-split0-seed0")  # doctest: +SKIP
    >>> run.predict(["one.png", "two.png"]).names  # doctest: +SKIP
    ['Ankle boot', 'Bag']
    """
    path = Path(run)
    if path.is_dir():
        path = path / NETWORK
    if not path.is_file():
        raise RunError(
            f"{path}: no such file; name the directory of a finished run, which has one, or end the run by "
            f"{as_called('train')} --resume --run-dir DIRECTORY"
        )
    try:
        chosen = resolve_device(device)
    except ConfigError as error:
        raise RunError(str(error)) from error
    try:
        return TrainedRun(path, chosen)
    except KeyError as error:
        raise RunError(
            f"{path} does not say how to use it: its metadata have no {error}. It is of another program or an older version; "
            "train again"
        ) from error
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, ImportError) as error:
        raise RunError(f"{path} cannot be used: {error}") from error
