"""Data sets of what a program has: arrays, or map-style data sets of PyTorch, torchvision or Hugging Face."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from r2d2fast.data.dataset import Dataset, Images
from r2d2fast.data.embeddings import Embeddings
from r2d2fast.data.errors import DataError
from r2d2fast.data.names import Names, Numbers
from r2d2fast.data.photographs.images import PhotographImages
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.resident import ResidentImages, channel_statistics

LARGEST_SIDE = 96
"""Pixels, STL-10's. Images of one size up to this are kept in memory as they are; others are photographs, which are cropped."""
CPU = torch.device("cpu")
# Where an item that is a mapping has its image and its class; a mapping may have several classes, of which the finest counts.
IMAGES, LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label", "target", "targets")


def dataset_from_arrays(
    x: Any, y: Any, x_test: Any = None, y_test: Any = None, *, class_names: Sequence[str] | None = None
) -> Dataset:
    """A data set of arrays or tensors, for :func:`r2d2fast.train_run`.

    Args:
        x: images, all of one size, ``[M, H, W]``, or arrays ``[M, H, W, C]`` or tensors ``[M, C, H, W]``, C 1 or 3; uint8, or
            float from 0 to 1, which become bytes; they are normalised later, so leave that out. Or vectors, float ``[M, D]``.
        y: integers ``[M]``, the class of each sample from 0; −1 where nobody knows it.
        x_test, y_test: the same to test on, if there are any.
        class_names: N names; their numbers without.

    Raises DataError for another shape or type, or labels that do not fit.
    """
    if (x_test is None) != (y_test is None):
        raise DataError(f"{'y_test' if y_test is None else 'x_test'} is None; give both, or neither")
    labels = _labels_of(y, len(x), "y", lowest=-1)
    test_labels = torch.empty(0, dtype=torch.int64) if y_test is None else _labels_of(y_test, len(x_test), "y_test", 0)
    names = class_names or [str(number) for number in range(int(torch.cat([labels, test_labels]).max()) + 1)]
    train: Images
    test: Images
    if len(x.shape) == 2:
        train = Embeddings(x, CPU)
        test = Embeddings(torch.empty(0, x.shape[1]) if x_test is None else x_test, CPU, "x_test")
    else:
        train, test = _resident(_pixels_of(x), None if x_test is None else _pixels_of(x_test))
    return _checked(Dataset(train, test, labels, test_labels, names, Numbers(len(labels))))


def dataset_from_torch(dataset: Any, test: Any = None) -> Dataset:
    """A data set of a map-style one of PyTorch, torchvision or Hugging Face, for :func:`r2d2fast.train_run`.

    Items are ``(image, class, …)``, or mappings with a key ``image`` or ``img`` and ``label`` or ``fine_label``. The class −1 or
    None is that of an unlabelled sample. Images, of Pillow or as in :func:`dataset_from_arrays`, without normalisation or
    augmentation, are read once and kept if they have one size of at most 96 pixels; others are read again for each epoch, cropped
    at random. The names of the classes are those that the data set has.

    Args:
        dataset: to train on.
        test: to test on, of the same kind; samples without a class are left out of it.

    Raises DataError for items of another kind, or labels that do not fit.
    """
    parts = [dataset] if test is None else [dataset, test]
    if any(not hasattr(part, "__getitem__") or not hasattr(part, "__len__") or not len(part) for part in parts):
        raise DataError("a data set has to be map-style, with __getitem__ and __len__, and have samples")
    labels = [classes_of(part) for part in parts]
    if test is not None and (labels[1] < 0).any():
        known = (labels[1] >= 0).nonzero().flatten()
        parts[1], labels[1] = Subset(test, known.tolist()), labels[1][known]
    names = _class_names(dataset) or [str(number) for number in range(int(torch.cat(labels).max()) + 1)]
    test_labels = labels[1] if test is not None else torch.empty(0, dtype=torch.int64)
    shape = _as_pixels(_image(parts[0][0])).shape
    pixels = [_all_of(part, shape) for part in parts]
    train: Images
    tests: Images
    if any(one is None for one in pixels):
        files = [ItemFiles(part) for part in parts] if test is not None else [ItemFiles(dataset), ItemFiles([])]
        train, tests = (PhotographImages(part, CPU, PhotographOptions()) for part in files)
    else:
        train, tests = _resident(*(pixels if test is not None else [pixels[0], None]))  # type: ignore[arg-type]
    return _checked(Dataset(train, tests, labels[0], test_labels, names, Numbers(len(dataset))))


class ItemFiles:
    """The images of a map-style data set as image files (``Files``): PPM, and PGM of grey ones, decoded to the same bytes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.names = Names.of(map(str, range(len(dataset))))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> bytes:
        return as_image_file(_as_pixels(_image(self.dataset[sample])))


def as_image_file(pixels: np.ndarray) -> bytes:
    """uint8 ``[H, W, 1 or 3]`` as a PGM or PPM file."""
    height, width, channels = pixels.shape
    return b"P%d %d %d 255\n" % (5 if channels == 1 else 6, width, height) + pixels.tobytes()


def _resident(train: np.ndarray, test: np.ndarray | None) -> tuple[ResidentImages, ResidentImages]:
    if test is None:
        test = train[:0]
    # Each part alone may be all grey, as one without a sample is.
    channels = max(train.shape[-1], test.shape[-1])
    train, test = (part.repeat(channels // part.shape[-1], axis=-1) for part in (train, test))
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"training images are {list(train.shape[1:])}, test images {list(test.shape[1:])}; both need one size"
        )
    pixels = [torch.from_numpy(part).permute(0, 3, 1, 2) for part in (train, test)]
    mean, std = channel_statistics(pixels[0])
    return ResidentImages(pixels[0], mean, std, CPU), ResidentImages(pixels[1], mean, std, CPU)


def _pixels_of(x: Any) -> np.ndarray:
    """uint8 ``[M, H, W, C]`` of many images at once."""
    images = _as_array(x, channels_in=4) if isinstance(x, Tensor) else np.asarray(x)
    if images.ndim == 3:
        images = images[..., None]
    return _as_bytes(images, 4)


def _as_pixels(image: Any) -> np.ndarray:
    """uint8 ``[H, W, C]`` of an image of Pillow, an array or a tensor."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    elif isinstance(image, Tensor):
        image = _as_array(image, channels_in=3)
    if not isinstance(image, np.ndarray):
        raise DataError(f"an image is a {type(image).__name__}; accepted: images of Pillow, arrays, tensors")
    return _as_bytes(image[..., None] if image.ndim == 2 else image, 3)


def _as_array(images: Tensor, channels_in: int) -> np.ndarray:
    """With the channels last, which tensors of so many dimensions have before height and width, and others, grey, have not."""
    return (images.movedim(-3, -1) if images.ndim == channels_in else images).cpu().numpy()


def _as_bytes(images: np.ndarray, dimensions: int) -> np.ndarray:
    if images.ndim != dimensions or images.shape[-1] not in (1, 3):
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}; accepted: arrays [H, W] or [H, W, C], tensors [H, W] or [C, H, W], "
            "C 1 or 3"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f" or not ((images >= 0) & (images <= 1)).all():
        raise DataError(
            f"images are {images.dtype} from {images.min():g} to {images.max():g}; accepted: uint8, or float from 0 to 1; leave "
            "normalisation to the trainer"
        )
    return np.rint(images * 255).astype(np.uint8)


def _all_of(dataset: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """uint8 ``[M, H, W, C]``; None from the first image that is too large or of another size than ``shape``."""
    if max(shape[:2]) > LARGEST_SIDE:
        return None
    images = np.empty((len(dataset), *shape[:2], 3), np.uint8)
    grey = True
    for sample in range(len(dataset)):
        pixels = _as_pixels(_image(dataset[sample]))
        if pixels.shape[:2] != shape[:2]:
            return None
        grey &= pixels.shape[2] == 1
        images[sample] = pixels
    return images[..., :1] if grey else images


def _image(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item[_key(item, IMAGES, "image")]
    return item[0] if isinstance(item, tuple | list) else item


def _key(item: Mapping[str, Any], accepted: Sequence[str], what: str) -> str:
    for key in accepted:
        if key in item:
            return key
    raise DataError(
        f"an item has {', '.join(map(repr, item))}, and no {what}: accepted are {', '.join(map(repr, accepted))}; rename one"
    )


def classes_of(dataset: Any) -> Tensor:
    """int64 ``[M]``, without a look at the images where the data set has its classes apart."""
    if isinstance(dataset, Subset):
        return classes_of(dataset.dataset)[torch.as_tensor(list(dataset.indices))]
    if hasattr(dataset, "column_names") and hasattr(dataset, "features"):
        return _labels_of(dataset[_key(dataset.features, LABELS, "class")], len(dataset), "the column of classes", -1)
    if getattr(dataset, "target_transform", None) is None:
        for name in ("targets", "labels", "_labels"):
            given = getattr(dataset, name, None)
            if given is not None and len(given) == len(dataset):
                return _labels_of(given, len(dataset), name, -1)
    return _labels_of([_class(dataset[sample]) for sample in range(len(dataset))], len(dataset), "the classes", -1)


def _class(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item[_key(item, LABELS, "class")]
    if isinstance(item, tuple | list) and len(item) > 1:
        return item[1]
    raise DataError(f"an item is a {type(item).__name__}; accepted: (image, class), or a mapping with both")


def _class_names(dataset: Any) -> list[str]:
    if isinstance(dataset, Subset):
        return _class_names(dataset.dataset)
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return list(getattr(features[_key(features, LABELS, "class")], "names", None) or [])
    return [str(name) for name in getattr(dataset, "classes", None) or []]


def _labels_of(y: Any, count: int, name: str, lowest: int) -> Tensor:
    values = y.cpu().numpy() if isinstance(y, Tensor) else np.asarray([-1 if one is None else one for one in y])
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise DataError(
            f"{name}: {values.dtype} {list(values.shape)}; accepted: integers [{count}], one for each sample"
        )
    values = values.astype(np.int64)
    if (values < lowest).any():
        raise DataError(
            f"{name}: a class is {values.min()}; accepted: numbers from 0" + ", -1 for unknown" * (lowest < 0)
        )
    return torch.from_numpy(values)


def _checked(dataset: Dataset) -> Dataset:
    largest = max(int(part.max()) for part in (dataset.train_labels, dataset.test_labels) if len(part))
    if largest >= dataset.num_classes:
        raise DataError(f"a class is {largest}, and there are {dataset.num_classes} names of classes, from 0")
    counts = torch.bincount(dataset.train_labels[dataset.train_labels >= 0], minlength=dataset.num_classes)
    if dataset.num_classes < 2 or not counts.all():
        raise DataError(f"samples of each class by number: {counts.tolist()}; needed are two classes, and one of each")
    return dataset
