"""Data sets of image files: folders of them, or packed copies."""

from pathlib import Path

import torch

from r2d2fast.command import as_called
from r2d2fast.data.dataset import Dataset, Images
from r2d2fast.data.errors import DataError
from r2d2fast.data.photographs.images import PhotographImages
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.photographs.packed import is_packed, open_packed
from r2d2fast.data.photographs.tree import TESTS, TRAIN, Tree, read_tree
from r2d2fast.data.small_folder import load_small_images, small_image_shape
from r2d2fast.image_options import TEST_FRACTION

_DEFAULTS = PhotographOptions()


def load_folder(
    root: Path,
    device: torch.device,
    options: PhotographOptions = _DEFAULTS,
    test_fraction: float = TEST_FRACTION,
) -> Dataset:
    """The images in a folder, or packed, as a data set; for layouts see ``tree.LAYOUTS``.

    Images that all have one size of at most 64 pixels are decoded at once and kept on the device (:mod:`small_folder`); others
    are photographs, decoded while training goes on. Names are paths within the training folder.

    Args:
        root: the folder.
        device: where batches are wanted.
        options: how photographs become batches; of small images only ``on_bad_image`` counts.
        test_fraction: see ``tree.read_tree``.

    Raises DataError if the folder has no such layout, or BadImageError for a small image that is damaged.
    """
    tree = open_packed(root) if is_packed(root) else read_tree(root, test_fraction)
    shape = small_image_shape(root)
    if shape is None:
        return _photographs(tree, device, options)
    return _dataset(tree, *load_small_images(tree, shape, device, options.on_bad_image))


def _photographs(tree: Tree, device: torch.device, options: PhotographOptions) -> Dataset:
    return _dataset(tree, *(PhotographImages(part.files, device, options) for part in (tree.train, tree.test)))


def _dataset(tree: Tree, train: Images, test: Images) -> Dataset:
    names = tree.train.files.names
    labels = tree.train.labels, tree.test.labels
    return Dataset(train, test, *labels, tree.class_names, names, tree.held_out, tree.ignored, tree.warnings)


def load_imagenet(root: Path, device: torch.device, options: PhotographOptions = _DEFAULTS) -> Dataset:
    """ImageNet (ILSVRC 2012), or some classes of it: photographs, with its own word on what is missing; :func:`load_folder`."""
    if not is_packed(root) and not all((root / part).is_dir() for part in (TRAIN, TESTS[0])):
        raise DataError(
            f"no ImageNet in {root}: it needs\n"
            f"  {root}/{TRAIN}/n01440764/n01440764_18.JPEG …   1000 folders, 1 281 167 images, of ILSVRC2012_img_train.tar, "
            "each class's own tar file unpacked in a folder of its name;\n"
            f"  {root}/{TESTS[0]}/n01440764/ILSVRC2012_val_00000293.JPEG …   50 000 images of ILSVRC2012_img_val.tar, sorted "
            "into the same folders.\n"
            "image-net.org gives both files to registered users. With them and ILSVRC2012_devkit_t12.tar.gz in that folder,\n"
            f'  python -c \'import torchvision.datasets as d; [d.ImageNet("{root}", part) for part in ("train", "val")]\'\n'
            f"unpacks and sorts them. Or name a folder that {as_called('pack')} has written"
        )
    return _photographs(open_packed(root) if is_packed(root) else read_tree(root), device, options)
