"""Images, labels, splits, augmentation and the batches made from them."""

from r2d2fast.data.batches import Batches, fold, mixed_steps, shuffled_steps
from r2d2fast.data.dataset import Augmentation, Dataset, Images, Order
from r2d2fast.data.draws import uniform
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import FolderImages, load_folder, load_imagenet
from r2d2fast.data.loading import LoaderError
from r2d2fast.data.photographs import PhotographOptions
from r2d2fast.data.readers import load_dataset
from r2d2fast.data.resident import ResidentImages
from r2d2fast.data.split import split_labels
from r2d2fast.data.split_files import read_split, write_split

__all__ = [
    "Augmentation",
    "Batches",
    "DataError",
    "Dataset",
    "FolderImages",
    "Images",
    "LoaderError",
    "Order",
    "PhotographOptions",
    "ResidentImages",
    "fold",
    "load_dataset",
    "load_folder",
    "load_imagenet",
    "mixed_steps",
    "read_split",
    "shuffled_steps",
    "split_labels",
    "uniform",
    "write_split",
]
