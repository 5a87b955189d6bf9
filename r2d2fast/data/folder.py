"""Photographs in folders, of their own sizes, decoded while training goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data.dataset import Augmentation, Dataset, Order
from r2d2fast.data.decode import BadImageError, decode
from r2d2fast.data.draws import uniform
from r2d2fast.data.errors import DataError
from r2d2fast.data.loading import load_batches
from r2d2fast.data.packed import is_packed, open_packed
from r2d2fast.data.tree import TESTS, TRAIN, Files, read_tree
from r2d2fast.data.views import RANDOM_NUMBERS, evaluation_view, training_view

ON_BAD_IMAGE = ("error", "skip")
# Of ImageNet's training images, in units of the full range; what networks trained on it expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class FolderImages:
    """One part of a data set of image files (``Images``), in a folder or packed.

    Training sees torchvision's RandomResizedCrop, mirrored with probability ½ if the augmentation says so; evaluation the centre
    after resizing the short side. Loader processes make batches of bytes, ahead; the device turns them into numbers: with
    ImageNet's mean and standard deviation, whatever the data set is, so that pretrained networks fit.

    Args:
        files: the encoded images.
        device: where batches are wanted.
        image_size: side of the images in a batch, pixels.
        resize: what the short side is resized to before evaluation takes the centre; at least ``image_size``.
        workers: loader processes; 0: images are decoded in this one, when they are asked for.
        on_bad_image: ``"error"``: a damaged image raises BadImageError, which names it. ``"skip"``: in its place comes an image
            of the mean colour, zeros once normalised, which tells the network next to nothing; the sample keeps its number and
            its row in the bank. (Another sample's picture would train this sample's label or pseudo-logits on what it does not
            show. To leave such images out for good, pack the data set with ``--on-bad-image skip``.)

    Attributes:
        shape: (3, image_size, image_size).
        bad_images: reason by name, of the damaged images met and skipped so far.
    """

    def __init__(
        self,
        files: Files,
        device: torch.device,
        image_size: int = 224,
        resize: int = 256,
        workers: int = 0,
        on_bad_image: str = "error",
    ) -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image is {on_bad_image!r}; accepted: {', '.join(ON_BAD_IMAGE)}")
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size is {image_size} and resize {resize}; accepted: 1 <= image_size <= resize")
        if workers < 0:
            raise ValueError(f"workers is {workers}; accepted: 0 or more")
        self.files = files
        self.shape = (3, image_size, image_size)
        self.bad_images: dict[str, str] = {}
        self._device = device
        self._resize = resize
        self._workers = workers
        self._skip = on_bad_image == "skip"
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, order: Order, augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for shifts or a cutout, which photographs do not have; while it goes on
        BadImageError, OSError for a file that cannot be read, LoaderError for a loader process that died."""
        if augmentation is not None and (augmentation.translate or augmentation.cutout):
            raise ValueError(
                f"translate is {augmentation.translate} and cutout {augmentation.cutout}; accepted for photographs: 0, they are "
                "cropped at random"
            )
        return self._batches(self.loading(augmentation, seed), order)

    def loading(self, augmentation: Augmentation | None, seed: int) -> "Load":
        """What loader processes call for each batch."""
        return Load(self.files, self.shape[1], self._resize, augmentation, seed)

    def _batches(self, load: "Load", order: Order) -> Iterator[Tensor]:
        for pixels, failures in load_batches(load, order, self._workers, pin=self._device.type == "cuda"):
            for failure in failures:
                if not (self._skip and isinstance(failure, BadImageError)):
                    raise failure
                self.bad_images[failure.name] = failure.reason
            images = pixels.to(self._device, non_blocking=True).to(torch.float32)
            yield images.mul_(self._scale).add_(self._shift)


@dataclass(frozen=True)
class Load:
    """What loader processes do: the images of a batch as bytes."""

    files: Files
    size: int
    resize: int
    augmentation: Augmentation | None
    seed: int

    def __call__(self, index: Tensor, draws: Tensor) -> tuple[Tensor, list[Exception]]:
        """Images, uint8 ``[B, 3, size, size]``, channels last, and what went wrong; exceptions of a worker lose their form."""
        images = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        numbers = uniform(self.seed, draws, RANDOM_NUMBERS).tolist() if self.augmentation is not None else []
        failures: list[Exception] = []
        for place, sample in enumerate(index.tolist()):
            try:
                pixels = decode(self.files.read(sample), self.files.names[sample])
            except (BadImageError, OSError) as error:
                failures.append(error)
                images[place] = torch.tensor(MEAN).mul(255).round().to(torch.uint8)[:, None, None]
                continue
            if self.augmentation is None:
                images[place] = evaluation_view(pixels, self.resize, self.size)[0]
            else:
                images[place] = training_view(pixels, self.size, numbers[place], self.augmentation.flip)[0]
        return images, failures


def load_folder(
    root: Path,
    device: torch.device,
    image_size: int = 224,
    resize: int = 256,
    workers: int = 0,
    on_bad_image: str = "error",
) -> Dataset:
    """The images in a folder, or packed, as a data set. Arguments as of :class:`FolderImages`; for layouts see ``tree.LAYOUTS``.

    Names are paths within the training folder. Raises DataError if the folder has no such layout.
    """
    tree = open_packed(root) if is_packed(root) else read_tree(root)
    train, test = (
        FolderImages(part.files, device, image_size, resize, workers, on_bad_image) for part in (tree.train, tree.test)
    )
    return Dataset(train, test, tree.train.labels, tree.test.labels, tree.class_names, tree.train.files.names)


def load_imagenet(
    root: Path,
    device: torch.device,
    image_size: int = 224,
    resize: int = 256,
    workers: int = 0,
    on_bad_image: str = "error",
) -> Dataset:
    """ImageNet (ILSVRC 2012), or some classes of it: :func:`load_folder`, with its own word about what is missing."""
    if not is_packed(root) and not all((root / part).is_dir() for part in (TRAIN, TESTS[0])):
        raise DataError(
            f"no ImageNet in {root}: it needs\n"
            f"  {root}/{TRAIN}/n01440764/n01440764_18.JPEG …   1000 folders, 1 281 167 images, of ILSVRC2012_img_train.tar, "
            "each class's own tar file unpacked in a folder of its name;\n"
            f"  {root}/{TESTS[0]}/n01440764/ILSVRC2012_val_00000293.JPEG …   50 000 images of ILSVRC2012_img_val.tar, sorted "
            "into the same folders.\n"
            "image-net.org gives both files to registered users. With them and ILSVRC2012_devkit_t12.tar.gz in that folder,\n"
            f'  python -c \'import torchvision.datasets as d; [d.ImageNet("{root}", part) for part in ("train", "val")]\'\n'
            "unpacks and sorts them. Or name a folder that python -m r2d2fast.data.pack has written"
        )
    return load_folder(root, device, image_size, resize, workers, on_bad_image)
