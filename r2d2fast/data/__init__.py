"""Images, labels, splits, augmentation and the batches made from them."""

from r2d2fast.data.augmentation import translate
from r2d2fast.data.batches import LabelledStream, mixed_batches, shuffled_batches
from r2d2fast.data.datasets import DATASETS, ImageDataset, load_dataset
from r2d2fast.data.split import split_labels

__all__ = [
    "DATASETS",
    "ImageDataset",
    "LabelledStream",
    "load_dataset",
    "mixed_batches",
    "shuffled_batches",
    "split_labels",
    "translate",
]
