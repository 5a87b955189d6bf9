"""Images or embeddings, labels, splits, augmentation and the batches made from them."""

from r2d2fast.data.dataset import Augmentation, Dataset, Images
from r2d2fast.data.embeddings import Embeddings, load_embeddings
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import FolderImages, load_folder, load_imagenet
from r2d2fast.data.loading import LoaderError
from r2d2fast.data.order import Batch, BatchSampler, consecutive_batches, mixed_steps, shuffled_steps
from r2d2fast.data.photographs import PhotographOptions
from r2d2fast.data.random_numbers import derive_seed, uniform
from r2d2fast.data.readers import load_dataset
from r2d2fast.data.resident import ResidentImages
from r2d2fast.data.split import split_labels
from r2d2fast.data.split_files import read_split, write_split

__all__ = [
    "Augmentation",
    "Batch",
    "BatchSampler",
    "DataError",
    "Dataset",
    "Embeddings",
    "FolderImages",
    "Images",
    "LoaderError",
    "PhotographOptions",
    "ResidentImages",
    "consecutive_batches",
    "derive_seed",
    "load_dataset",
    "load_embeddings",
    "load_folder",
    "load_imagenet",
    "mixed_steps",
    "read_split",
    "shuffled_steps",
    "split_labels",
    "uniform",
    "write_split",
]
