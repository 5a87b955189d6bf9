"""Photographs in folders, of their own sizes, decoded while training goes on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from r2d2fast.data.dali import dali_batches, require_dali
from r2d2fast.data.dataset import Augmentation, Dataset
from r2d2fast.data.decode import BadImageError
from r2d2fast.data.errors import DataError
from r2d2fast.data.loading import load_batches
from r2d2fast.data.order import Batch
from r2d2fast.data.packed import is_packed, open_packed
from r2d2fast.data.photographs import MEAN, STD, Load, PhotographOptions
from r2d2fast.data.tree import TESTS, TRAIN, Files, read_tree

_DEFAULTS = PhotographOptions()


class FolderImages:
    """One part of a data set of image files (``Images``), in a folder or packed.

    Training sees torchvision's RandomResizedCrop, mirrored with probability ½ if the augmentation says so; evaluation the centre
    after resizing the short side. Loader processes make batches of bytes, ahead; the device turns them into numbers: with
    ImageNet's mean and standard deviation, whatever the data set is, so that pretrained networks fit.

    Args:
        files: the encoded images.
        device: where batches are wanted.
        options: how they are made.

    Attributes:
        shape: (3, image_size, image_size).
        bad_images: reason by name, of the damaged images met and skipped so far.

    Raises DataError if the options ask for a decoder that is not installed.
    """

    def __init__(self, files: Files, device: torch.device, options: PhotographOptions = _DEFAULTS) -> None:
        if options.decoder == "dali":
            require_dali()
        self.files = files
        self.shape = (3, options.image_size, options.image_size)
        self.bad_images: dict[str, str] = {}
        self._device = device
        self._options = options
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for shifts or a cutout, which photographs do not have; while it goes on
        BadImageError, OSError for a file that cannot be read, LoaderError for a loader process that died."""
        if augmentation is not None and (augmentation.translate or augmentation.cutout):
            raise ValueError(
                f"translate is {augmentation.translate} and cutout {augmentation.cutout}; accepted for photographs: 0, they are "
                "cropped at random"
            )
        return self._batches(self.loading(augmentation, seed), order)

    def loading(self, augmentation: Augmentation | None, seed: int) -> Load:
        """What loader processes call for each batch, where the CPU decodes."""
        return Load(self.files, self._options, augmentation, seed)

    def _batches(self, load: Load, order: Sequence[Batch]) -> Iterator[Tensor]:
        if self._options.decoder == "dali":
            loaded = dali_batches(load, order, self._device)
        else:
            loaded = load_batches(load, order, self._options.workers, pin=self._device.type == "cuda")
        for pixels, failures in loaded:
            for failure in failures:
                if not (self._options.on_bad_image == "skip" and isinstance(failure, BadImageError)):
                    raise failure
                self.bad_images[failure.name] = failure.reason
            images = pixels.to(self._device, non_blocking=True).to(torch.float32)
            yield images.mul_(self._scale).add_(self._shift)


def load_folder(root: Path, device: torch.device, options: PhotographOptions = _DEFAULTS) -> Dataset:
    """The images in a folder, or packed, as a data set; for layouts see ``tree.LAYOUTS``.

    Names are paths within the training folder. Raises DataError if the folder has no such layout.
    """
    tree = open_packed(root) if is_packed(root) else read_tree(root)
    train, test = (FolderImages(part.files, device, options) for part in (tree.train, tree.test))
    return Dataset(train, test, tree.train.labels, tree.test.labels, tree.class_names, tree.train.files.names)


def load_imagenet(root: Path, device: torch.device, options: PhotographOptions = _DEFAULTS) -> Dataset:
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
    return load_folder(root, device, options)
