"""``python -m r2d2fast.data.embed SOURCE DEST --backbone NAME``: images, as a pretrained network sees them, for the data set
``embeddings``."""

import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
import tyro
from rich.progress import track
from torch import Tensor, nn

from r2d2fast.command import as_called
from r2d2fast.data.errors import DataError
from r2d2fast.data.order import Batch, consecutive_batches
from r2d2fast.data.partial_folder import partial_folder, writing
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.images import Load
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.photographs.packed import is_packed, open_packed
from r2d2fast.data.photographs.tree import Part, Tree, read_tree
from r2d2fast.data.photographs.workers import LoaderError, load_batches
from r2d2fast.devices import find_device
from r2d2fast.files import replace_file
from r2d2fast.help_texts import description, with_help_texts
from r2d2fast.image_options import TEST_FRACTION, OnBadImage
from r2d2fast.models import FeatureExtractor, make_feature_extractor

PROGRAM = as_called("embed")
ABOUT = "embed.json"
PROGRESS = "progress.json"
# What is computed again after a crash.
SECONDS_BETWEEN_SAVES = 5.0

Precision = Literal["float32", "bfloat16"]


@with_help_texts
@dataclass(frozen=True)
class Arguments:
    """Write the embeddings of images, what a pretrained network makes of each, as a data set to train a classifier on
    (the trainer's --dataset embeddings --data-dir DEST)."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of images, or a packed one."""

    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Folder to write. The same command goes on where one that was stopped left off."""

    backbone: str
    """Network: timm:NAME or torchvision:NAME. Images are resized, cut and normalised as it wants them."""

    pretrained: Path | None = None
    """File of its weights, safetensors or a PyTorch state_dict; without, the library downloads its own."""

    image_size: int | None = None
    """Side in pixels of the square that the network sees. Default: the network's own."""

    batch: int = 64
    """Images that the network takes at a time."""

    dtype: Literal["float16", "float32"] = "float16"
    """Of the numbers that are written."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network's arithmetic. auto: bfloat16 on a GPU that has it; on a CPU whichever is faster for the first batch."""

    device: str = "auto"
    """Where the network runs: cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu."""

    workers: int | None = None
    """Processes that decode images; 0: this one. Default: as many as there are CPUs where the network runs on a GPU, else 0."""

    on_bad_image: OnBadImage = "error"
    """What a damaged image does: stop the program, or be left out and listed."""

    test_fraction: float = TEST_FRACTION
    """Of the labelled images of each class, the share that is kept for tests where there is no part for them; 0 for none."""


def embed(arguments: Arguments) -> dict[str, Any]:
    """Write the embeddings of all images of a source into a folder.

    The folder has ``train.npy``, float16 or float32 ``[M, D]``; ``train_labels.npy``, int64 ``[M]``, −1 where unlabelled;
    ``train_names.txt``; the same of ``test`` if there is a test part; ``classes.txt``; and ``embed.json``, which says how they
    were made. It appears when all of it is on the disk; until then the files are in ``dest`` + ``.partial``, from where the same
    call goes on after it was stopped at any moment, to the same bytes.

    Returns:
        What ``embed.json`` holds.

    Raises DataError, whose message says what to do, for a source that is no data set of images, a network or weights that cannot
    be had, a damaged image, an embedding that is not finite, a destination that exists, cannot be written, or was begun with
    other settings; LoaderError if a loader process dies.
    """
    if arguments.dest.exists():
        raise DataError(f"{arguments.dest} exists; remove it, or name another destination")
    for flag, number in (("--batch", arguments.batch), ("--image-size", arguments.image_size or 1)):
        if number < 1:
            raise DataError(f"{flag} is {number}; accepted: 1 or more")
    tree = (
        open_packed(arguments.source)
        if is_packed(arguments.source)
        else read_tree(arguments.source, arguments.test_fraction)
    )
    parts = {"train": tree.train} | ({"test": tree.test} if len(tree.test.files) else {})
    for name in (*tree.class_names, *(name for part in parts.values() for name in part.files.names)):
        if "\n" in name:
            raise DataError(f"{name!r} has a line break in it, which the files of names cannot hold; rename it")
    try:
        device = find_device(arguments.device)
    except ValueError as error:
        raise DataError(str(error)) from error
    try:
        extractor = make_feature_extractor(arguments.backbone, arguments.pretrained, arguments.image_size)
    except (ValueError, ImportError) as error:
        raise DataError(f"--backbone {arguments.backbone}: {error}") from error
    with partial_folder(arguments.dest, resumable=True) as partial:
        settings = _settings(arguments, tree, parts, extractor)
        state = _State.open(partial, settings)
        features = _Features(extractor, device, arguments.precision if state.precision is None else state.precision)
        for name, part in parts.items():
            _embed_part(arguments, partial, state, name, part, features)
        _write_lines(partial / "classes.txt", tree.class_names)
        about = settings | {"precision": state.precision, "skipped": state.skipped, "held_out": tree.held_out}
        about["images"] = {name: state.written[name] for name in parts}
        about["features"] = np.load(partial / "train.npy", mmap_mode="r").shape[1]
        _write(partial / ABOUT, _json(about))
        with writing(partial / PROGRESS):
            os.unlink(partial / PROGRESS)
    return about


def _settings(arguments: Arguments, tree: Tree, parts: dict[str, Part], extractor: FeatureExtractor) -> dict[str, Any]:
    """What decides the numbers, in the form of JSON: a run that was stopped can be gone on with only if all of it is the same."""
    weights = 0
    for tensor in extractor.network.state_dict().values():
        weights = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), weights)
    names = [
        [zlib.crc32(part.files.names.text.tobytes()), zlib.crc32(part.labels.numpy().tobytes())]
        for part in parts.values()
    ]
    return {
        "source": str(arguments.source.resolve()),
        "classes": list(tree.class_names),
        "names_and_labels_crc32": names,
        "backbone": arguments.backbone,
        "weights_crc32": weights,
        "image_size": extractor.images.image_size,
        "resize": extractor.images.resize,
        "interpolation": extractor.images.interpolation,
        "mean": list(extractor.images.mean),
        "std": list(extractor.images.std),
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "precision": arguments.precision,
    }


class _State:
    """How far the writing of a folder is, kept in the folder.

    Attributes:
        precision: of the network's arithmetic, once it is chosen.
        done: by part, the images that have been looked at.
        written: by part, the rows written; fewer where damaged images are left out.
        skipped: by part, the damaged images and why.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.precision: str | None = None
        self.done = {"train": 0, "test": 0}
        self.written = {"train": 0, "test": 0}
        self.skipped: dict[str, dict[str, str]] = {"train": {}, "test": {}}

    @staticmethod
    def open(partial: Path, settings: dict[str, Any]) -> "_State":
        state = _State(partial / PROGRESS, settings)
        try:
            saved = json.loads(state.path.read_bytes())
        except FileNotFoundError:
            return state
        different = [name for name, value in settings.items() if saved["settings"].get(name) != value]
        if different:
            raise DataError(
                f"{partial} was begun with another {', '.join(different)}; repeat the command with which it was begun, or remove "
                "that folder to begin anew"
            )
        state.precision, state.done, state.written = saved["precision"], saved["done"], saved["written"]
        state.skipped = saved["skipped"]
        return state

    def save(self) -> None:
        names = ("settings", "precision", "done", "written", "skipped")
        _write(self.path, _json({name: getattr(self, name) for name in names}))


class _Features:
    """A network on its device, and its precision.

    ``precision`` is ``"auto"`` until the first batch.
    """

    def __init__(self, extractor: FeatureExtractor, device: torch.device, precision: str) -> None:
        self.extractor = extractor
        self.device = device
        self.network: nn.Module = extractor.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        statistics = extractor.images.mean, extractor.images.std
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 ``[B, D]`` of uint8 ``[B, 3, size, size]``, channels last."""
        images = pixels.to(self.device, non_blocking=True).float().mul_(self._scale).add_(self._shift)
        if self.precision == "auto":
            self.precision = self._faster(images)
        return self._forward(images, self.precision).float()

    def _forward(self, images: Tensor, precision: str) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            features = self.network(images)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise DataError("the network does not give one row of numbers for each image; take another --backbone")
        return features

    def _faster(self, images: Tensor) -> Precision:
        if self.device.type == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        seconds: dict[Precision, float] = {}
        for precision in ("float32", "bfloat16"):
            self._forward(images, precision)  # the first time memory is allocated and weights are put in order
            began = time.perf_counter()
            self._forward(images, precision)
            seconds[precision] = time.perf_counter() - began
        return min(seconds, key=lambda precision: seconds[precision])


def _embed_part(arguments: Arguments, partial: Path, state: _State, name: str, part: Part, features: _Features) -> None:
    """Write the rows of a part that are not there yet, and then its labels and names."""
    path, names = partial / f"{name}.npy", part.files.names
    order = consecutive_batches(torch.arange(state.done[name], len(names)), arguments.batch)
    with writing(path), closing(_RowsFile(path, state.written[name], np.dtype(arguments.dtype))) as file:
        saved = time.monotonic()
        for batch, pixels, bad in _loaded(arguments, part, order, features, name):
            kept = [place for place, sample in enumerate(batch.samples.tolist()) if names[sample] not in bad]
            with np.errstate(over="ignore"):  # found out in the next line
                values = features(pixels).cpu().numpy().astype(arguments.dtype)[kept]
            infinite = ~np.isfinite(values).all(1)
            if infinite.any():
                sample = int(batch.samples[kept[int(infinite.argmax())]])
                raise DataError(
                    f"the embedding of {names[sample]} is not finite in {arguments.dtype}; take --dtype float32 --precision "
                    "float32 if its numbers are large, or other weights"
                )
            file.append(values)
            state.precision = features.precision
            state.done[name] += len(batch.samples)
            state.written[name] += len(kept)
            state.skipped[name] |= bad
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or batch is order[-1]:
                file.sync()
                state.save()
                saved = time.monotonic()
    if state.written[name] == 0:
        raise DataError(
            f"none of the {len(names)} images of part {name!r} can be decoded; mend them, or name another source"
        )
    kept_samples = [sample for sample, one in enumerate(names) if one not in state.skipped[name]]
    labels = io.BytesIO()
    np.save(labels, part.labels[kept_samples].numpy())
    _write(partial / f"{name}_labels.npy", labels.getvalue())
    _write_lines(partial / f"{name}_names.txt", (names[sample] for sample in kept_samples))


def _loaded(
    arguments: Arguments, part: Part, order: Sequence[Batch], features: _Features, name: str
) -> Iterator[tuple[Batch, Tensor, dict[str, str]]]:
    """Each batch with its pixels, uint8 ``[B, 3, size, size]``, and the damaged images in it and why."""
    on_gpu = features.device.type == "cuda"
    workers = arguments.workers
    if workers is None:
        workers = (os.cpu_count() or 1) if on_gpu else 0
    own = features.extractor.images
    options = PhotographOptions(own.image_size, own.resize, workers, interpolation=own.interpolation)
    loaded = load_batches(Load(part.files, options, None, 0), order, workers, pin=on_gpu)
    both = zip(order, loaded, strict=True)
    for batch, (pixels, failures) in track(both, f"embedding {name}", len(order), disable=not sys.stderr.isatty()):
        bad: dict[str, str] = {}
        for failure in failures:
            if isinstance(failure, OSError):
                raise DataError(f"cannot read an image of part {name!r}: {failure}") from failure
            if arguments.on_bad_image == "error" or not isinstance(failure, BadImageError):
                raise failure
            bad[failure.name] = failure.reason
        yield batch, pixels, bad


class _RowsFile:
    """An .npy file of rows that grows.

    Args:
        path: of the file.
        rows: that are there already and are kept; what follows them goes.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, rows: int, dtype: np.dtype) -> None:
        self._rows = rows
        self._dtype = dtype
        self._columns = 0
        self._file: BinaryIO = open(path, "r+b" if rows else "w+b")  # noqa: SIM115
        if rows:
            np.lib.format.read_magic(self._file)
            (_, self._columns), _, _ = np.lib.format.read_array_header_1_0(self._file)
            self._file.truncate(self._file.tell() + rows * self._columns * dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def append(self, values: np.ndarray) -> None:
        """Add rows ``[n, D]``."""
        if self._columns == 0:
            self._columns = values.shape[1]
            self._write_header()
        self._file.write(values.tobytes())
        self._rows += len(values)

    def sync(self) -> None:
        """Wait until all rows, and their number, are on the disk."""
        if self._columns:
            self._file.seek(0)
            self._write_header()  # as long as before: NumPy leaves room for any number of rows
            self._file.seek(0, os.SEEK_END)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, self._columns)}
        np.lib.format.write_array_header_1_0(self._file, about)


def _write(path: Path, content: bytes) -> None:
    with writing(path):
        replace_file(path, content)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    _write(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def main(arguments: list[str] | None = None) -> int:
    """Embed as the command line says; the exit status: 0 done, 1 it cannot be done, 2 no such flag, 130 interrupted."""
    about = description(Arguments)
    chosen = tyro.cli(
        Arguments, args=arguments, prog=PROGRAM, description=about, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        made = embed(chosen)
    except (DataError, LoaderError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for name, count in made["images"].items():
        skipped = made["skipped"][name]
        print(f"{name}: {count} images x {made['features']} numbers, {made['dtype']}, {len(skipped)} skipped")
        for image, reason in skipped.items():
            print(f"  {image}: {reason}")
    if made["held_out"]:
        print(
            f"{made['held_out']} labelled images are the test part, since the source has none; --test-fraction changes how many"
        )
    print(f"computed in {made['precision']}; {as_called('train')} --dataset embeddings --data-dir {chosen.dest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
