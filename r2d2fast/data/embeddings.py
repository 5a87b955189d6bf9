"""Embeddings: what a pretrained network makes of each sample, rows of numbers in memory, on the device, or in a mapped file."""

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from r2d2fast.data.dataset import Augmentation, Dataset
from r2d2fast.data.errors import DataError
from r2d2fast.data.file_rows import FileRows
from r2d2fast.data.names import Names, Numbers
from r2d2fast.data.order import Batch
from r2d2fast.data.preprocessing import Preprocessing

DTYPES = (torch.float16, torch.float32, torch.float64)
# Of the memory that is free: what is to be read into it; the bank and the other programs need some, too.
SHARE_OF_FREE_MEMORY = 0.25
# Rows are examined so many bytes at a time, in float64.
_PIECE = 2**24


class Embeddings:
    """One part of a data set of embeddings (``Images``, whose batches are float32 ``[B, D]`` here, as the rows are).

    The rows stay in their own type: of float16 no larger copy is ever made. They are kept on the device where they take at most
    half of its free memory, and otherwise where they are; those of a mapped file are read from it, batch by batch.

    Args:
        rows: float16, float32 or float64 ``[M, D]``, a tensor or an array, perhaps a mapped one; not copied if its rows are
            contiguous. M may be 0.
        device: where batches are wanted.
        name: what error messages call the rows.

    Attributes:
        shape: (D,).
        mean, std: float32 ``[D]``, on the CPU, of each feature over all rows, computed in float64; 0 and 1 where there is no row.
            The deviation of a feature that has one value everywhere, up to float32's rounding, is given as 1.

    Raises:
        DataError: another shape or type, or a number that is not finite as float32, whose row is named.
    """

    def __init__(self, rows: Tensor | np.ndarray, device: torch.device, name: str = "X") -> None:
        file = None
        if isinstance(rows, np.ndarray):
            if rows.dtype.kind != "f" or rows.dtype.itemsize > 8:
                raise DataError(f"{name} is {rows.dtype}; accepted: float16, float32, float64")
            rows = _contiguous(rows)
            file = FileRows.of(rows) if rows.ndim == 2 else None
            rows = _as_tensor(rows)
        if rows.dtype not in DTYPES or rows.ndim != 2 or rows.shape[1] == 0:
            raise DataError(
                f"{name} is {rows.dtype} {list(rows.shape)}; accepted: float16, float32, float64 [M, D], a row of D >= 1 "
                "numbers for each sample"
            )
        self.shape = (rows.shape[1],)
        self.bad_images: dict[str, str] = {}  # nothing is left to decode
        self._device = device
        self._file = file
        self._rows = rows.detach()
        self._take_along()
        self.preprocessing = Preprocessing("embeddings", self.shape)
        self.mean, self.std = self._examine(name)

    def to(self, device: torch.device) -> "Embeddings":
        """The same rows, with batches made on ``device``."""
        moved = copy.copy(self)
        moved._device = device
        moved._take_along()
        return moved

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for an augmentation of images."""
        if augmentation is not None and (augmentation.translate or augmentation.flip or augmentation.cutout):
            raise ValueError(f"{augmentation} is for images; accepted for embeddings: no shifts, no flip, no cutout")
        return self._batches(order)

    def _batches(self, order: Sequence[Batch]) -> Iterator[Tensor]:
        if not order:
            return
        sizes = [len(batch.samples) for batch in order]
        # Once for the whole order: each copy to a GPU from ordinary memory makes the host wait.
        indices = torch.cat([batch.samples for batch in order]).to(self._rows.device).split(sizes)
        for index in indices:
            rows = self._rows.index_select(0, index) if self._file is None else self._file.read(index)
            if rows.device != self._device:
                rows = rows.pin_memory().to(self._device, non_blocking=True)
            yield rows.float()

    def on_device(self, augmentation: Augmentation, seed: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """As ``ResidentImages.on_device``, without an augmentation; None where the rows are not kept on the device."""
        if self._file is not None or self._rows.device != self._device:
            return None
        return lambda samples, keys: self._rows.index_select(0, samples).float()

    def _take_along(self) -> None:
        """Keep the rows on the device, where they fit."""
        rows, device = self._rows, self._device
        if device.type == "cuda" and rows.device != device and rows.nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
            self._rows, self._file = rows.to(device), None

    def _examine(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation; pieces are put together by the formula of Chan, Golub and LeVeque (1979)."""
        mean = torch.zeros(self.shape, dtype=torch.float64, device=self._rows.device)
        squares = torch.zeros_like(mean)
        count = 0
        pieces = self._rows.split(max(_PIECE // (8 * self.shape[0]), 1)) if len(self) else ()
        for piece in pieces:
            # NaN is both least and largest.
            if not torch.isfinite(torch.stack(piece.aminmax()).float()).all():
                _refuse(piece.float(), count, name)
            values = piece.to(torch.float64, copy=True)
            of_piece = values.mean(0)
            values -= of_piece
            difference, total = of_piece - mean, count + len(piece)
            squares += values.square_().sum(0) + difference.square() * (count * len(piece) / total)
            mean += difference * (len(piece) / total)
            count = total
            if self._file is not None:
                self._file.forget()
        std = (squares / max(count, 1)).sqrt()
        constant = std <= 4 * torch.finfo(torch.float32).eps * mean.abs()
        return mean.float().cpu(), torch.where(constant, 1.0, std).float().cpu()


def _refuse(values: Tensor, first: int, name: str) -> NoReturn:
    row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
    kind = "NaN" if math.isnan(values[row, column]) else "inf, or a number too large for float32,"
    raise DataError(f"{name} has {kind} in row {first + row}, column {column}; mend the row or leave it out")


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Copied unless rows are contiguous and of this machine's byte order."""
    native = array.dtype.newbyteorder("=")
    if array.dtype != native or array.ndim != 2 or array.strides[1] != array.itemsize or array.strides[0] < 0:
        return np.ascontiguousarray(array, native)
    return array


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nobody writes
        return torch.from_numpy(array)


# --- a folder ------------------------------------------------------------------------------------------------------

LAYOUT = """\
  {root}/train.npy          float16, float32 or float64 [M, D], a row for each sample; or train.safetensors, with one tensor
  {root}/train_labels.npy   int64 [M], the number of each sample's class from 0, -1 where it is unlabelled
and if you have them
  {root}/test.npy           or test.safetensors, [T, D], and {root}/test_labels.npy, int64 [T]
  {root}/classes.txt        the name of each class, one a line
  {root}/train_names.txt    the name of each sample, one a line"""


def load_embeddings(root: Path, device: torch.device) -> Dataset:
    """The embeddings in a folder, as a data set; its files are those of :data:`LAYOUT`.

    Files that take more than a quarter of the free memory are mapped, others are read. Without a test part that of the data set
    has no rows. Samples are named by their numbers if no file names them.

    Raises:
        DataError: a file that is missing, damaged, of another shape or type, or with numbers that cannot be.
    """
    train = _read_rows(root, "train")
    labels_path = root / "train_labels.npy"
    if train is None or not labels_path.is_file():
        missing = "train.npy" if train is None else labels_path.name
        raise DataError(f"missing in {root}: {missing}. A folder of embeddings has\n{LAYOUT.format(root=root)}")
    rows = Embeddings(train, device, f"{root}/train")
    labels = _read_labels(labels_path, len(rows), lowest=-1)
    class_names = _class_names(root / "classes.txt", labels)
    _check_labels(labels, labels_path, class_names)
    names = _sample_names(root, "train", len(rows))
    _check_different(names, root / "train_names.txt")
    test, test_labels = _read_test(root, device, rows.shape[0], class_names)
    return Dataset(rows, test, labels, test_labels, class_names, names)


class LabelCounts(NamedTuple):
    """How many samples a folder of embeddings has, how many of them have a label, and of how many classes."""

    samples: int
    labelled: int
    classes: int


def count_labels(root: Path) -> LabelCounts | None:
    """The numbers of a folder of embeddings; None where its labels are not there, or there are none."""
    path = root / "train_labels.npy"
    if not path.is_file():
        return None
    array = _load_npy(path)
    labels = _read_labels(path, len(array) if array.ndim else 0, lowest=-1)
    labelled = int((labels >= 0).sum())
    return LabelCounts(len(labels), labelled, len(_class_names(root / "classes.txt", labels))) if labelled else None


class EmbeddingFile(NamedTuple):
    """A file of embeddings to be labelled, and what the files beside it say of them.

    Attributes:
        rows: float16, float32 or float64 ``[M, D]``, mapped if it is large.
        names: of the rows, from ``PART_names.txt``; their numbers if there is no such file.
        labels: int64 ``[M]``, from ``PART_labels.npy``, −1 where nobody knows the class.
        class_names: that the labels are numbers of, from ``classes.txt``; their numbers if there is no such file.
    """

    rows: np.ndarray
    names: Sequence[str]
    labels: Tensor
    class_names: Sequence[str]


def embedding_files(source: Path) -> list[Path]:
    """``source`` if it is a file; of a folder, its parts ``train`` and ``test``. Raises DataError where there is none."""
    if not source.is_dir():
        return [source]
    found = [path for part in ("train", "test") if (path := _rows_path(source, part)) is not None]
    if not found:
        raise DataError(f"{source} has no embeddings: neither train.npy nor test.npy (nor .safetensors)")
    return found


def read_embedding_file(path: Path) -> EmbeddingFile:
    """A ``.npy`` or ``.safetensors`` file of embeddings, of any name. Raises DataError where it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a .npy or .safetensors file of embeddings, or a folder of them")
    rows = _read_rows_file(path)
    labels_path = path.with_name(f"{path.stem}_labels.npy")
    labels = torch.full((len(rows),), -1)
    if labels_path.is_file():
        labels = _read_labels(labels_path, len(rows), lowest=-1)
    class_names = _class_names(path.with_name("classes.txt"), labels)
    _check_range(labels, labels_path, class_names)
    return EmbeddingFile(rows, _sample_names(path.parent, path.stem, len(rows)), labels, class_names)


def _sample_names(root: Path, part: str, count: int) -> Sequence[str]:
    path = root / f"{part}_names.txt"
    if not path.is_file():
        return Numbers(count)
    names = Names.of(_lines(path))
    if len(names) != count:
        raise DataError(f"{path} has {len(names)} lines for {count} rows; one for each is needed")
    return names


def _check_different(names: Sequence[str], path: Path) -> None:
    """Raise DataError where two samples have one name, by which split files and ``labels.csv`` tell them."""
    lines: dict[str, int] = {}
    for number, name in enumerate(names, start=1) if isinstance(names, Names) else ():
        if lines.setdefault(name, number) != number:
            raise DataError(
                f"{path}, line {number}: {name!r} is in line {lines[name]} already; give each row its own name"
            )


def _read_test(
    root: Path, device: torch.device, features: int, class_names: Sequence[str]
) -> tuple[Embeddings, Tensor]:
    rows, path = _read_rows(root, "test"), root / "test_labels.npy"
    if rows is None and not path.is_file():
        return Embeddings(torch.empty(0, features), device), torch.empty(0, dtype=torch.int64)
    if rows is None or not path.is_file():
        there, lacking = ("test_labels.npy", "test.npy") if rows is None else ("test.npy", "test_labels.npy")
        raise DataError(f"{root} has {there} but no {lacking}; add it, or remove {there} to train without test data")
    test = Embeddings(rows, device, f"{root}/test")
    if test.shape != (features,):
        raise DataError(
            f"the rows of {root}/test have {test.shape[0]} numbers, those of {root}/train {features}; "
            "make both with the same network, or remove the test files"
        )
    labels = _read_labels(path, len(test), lowest=0)
    _check_range(labels, path, class_names)
    return test, labels


def _rows_path(root: Path, part: str) -> Path | None:
    return next((path for end in ("npy", "safetensors") if (path := root / f"{part}.{end}").is_file()), None)


def _read_rows(root: Path, part: str) -> np.ndarray | None:
    """The array in PART.npy or PART.safetensors; None where there is no such file."""
    path = _rows_path(root, part)
    return None if path is None else _read_rows_file(path)


def _read_rows_file(path: Path) -> np.ndarray:
    """The array in a file, mapped if it is large."""
    rows = _map_safetensors(path) if path.suffix == ".safetensors" else _load_npy(path)
    return rows if rows.nbytes > SHARE_OF_FREE_MEMORY * _free_memory() else np.array(rows)


def _load_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy file: {error}. Write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive of arrays; write the one that is meant with numpy.save")
    return array


def _map_safetensors(path: Path) -> np.ndarray:
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    try:
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little") + 8
            # A damaged length would ask for any amount of memory.
            header = json.loads(file.read(min(start - 8, path.stat().st_size)))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        found = [(tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"][0]) for tensor in tensors]
        if len(found) == 1 and found[0][0] in kinds:
            kind, shape, offset = found[0]
            return np.memmap(path, kinds[kind], "r", start + offset, shape)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as a .safetensors file: {error!r:.200}. Write it anew") from error
    raise DataError(
        f"{path} holds {', '.join(f'{kind} {list(shape)}' for kind, shape, _ in found) or 'nothing'}; accepted: one tensor, "
        "F16, F32 or F64 [M, D]"
    )


def _free_memory() -> int:
    """Bytes that programs can take before others have to go."""
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):  # not on Linux
        if not hasattr(os, "sysconf"):  # on Windows: nobody says, and rows stay in their file
            return 0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_labels(path: Path, count: int, lowest: int) -> Tensor:
    labels = _load_npy(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{path} is {labels.dtype} {list(labels.shape)}; needed is int64 [{count}], a class for each row"
        )
    tensor = torch.from_numpy(labels.astype(np.int64))
    below = (tensor < lowest).nonzero()
    if len(below):
        row = int(below[0])
        accepted = "numbers of classes from 0" + ", and -1 for an unlabelled sample" * (lowest < 0)
        raise DataError(f"{path}: the label of row {row} is {int(tensor[row])}; accepted: {accepted}")
    return tensor


def _class_names(path: Path, labels: Tensor) -> Sequence[str]:
    if not path.is_file():
        return [str(number) for number in range(int(labels.max()) + 1 if len(labels) else 0)]
    names = [line.strip() for line in _lines(path)]
    if not all(names) or len(set(names)) != len(names):
        raise DataError(f"{path} has an empty line, or a name twice; it takes a name for each class, one a line")
    return names


def _check_labels(labels: Tensor, path: Path, class_names: Sequence[str]) -> None:
    """That there is a label of each class, of two classes at least."""
    _check_range(labels, path, class_names)
    counts = torch.bincount(labels[labels >= 0], minlength=len(class_names))
    if not counts.any():
        raise DataError(f"{path} labels no sample: all are -1; label some of each class")
    if len(counts) < 2:
        raise DataError(f"{path} has one class only; samples of two or more have to be labelled")
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        raise DataError(
            f"{path}: class {empty} ({class_names[empty]}) has no labelled sample, so nothing can be learned of it; label one, "
            "or leave the class out and number the others anew"
        )


def _check_range(labels: Tensor, path: Path, class_names: Sequence[str]) -> None:
    above = (labels >= len(class_names)).nonzero()
    if len(above):
        row = int(above[0])
        raise DataError(
            f"{path}: the label of row {row} is {int(labels[row])}, and there are {len(class_names)} classes, from 0 (a line "
            "each in classes.txt; without that file, up to the largest in train_labels.npy)"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
