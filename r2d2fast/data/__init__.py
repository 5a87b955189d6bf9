"""Images or embeddings, labels, splits, augmentation and the batches made from them."""

from r2d2fast.data.dataset import Augmentation, Dataset, Images
from r2d2fast.data.embeddings import Embeddings, load_embeddings
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import load_folder, load_imagenet
from r2d2fast.data.in_memory import dataset_from_arrays, dataset_from_torch
from r2d2fast.data.named import load_named
from r2d2fast.data.order import Batch, BatchSampler, consecutive_batches, mixed_steps, shuffled_steps
from r2d2fast.data.photographs.images import PhotographImages
from r2d2fast.data.photographs.options import PhotographOptions
from r2d2fast.data.photographs.workers import LoaderError
from r2d2fast.data.preprocessing import Preprocessing
from r2d2fast.data.random_numbers import derive_seed, uniform
from r2d2fast.data.resident import ResidentImages
from r2d2fast.data.sharded import Partition, ShardedBatchSampler, ShardedPseudoLabelBank
from r2d2fast.data.small_folder import small_image_shape
from r2d2fast.data.small_images import load_dataset
from r2d2fast.data.split import split_labels
from r2d2fast.data.split_files import read_split, write_split

__all__ = [
    "Augmentation",
    "Batch",
    "BatchSampler",
    "DataError",
    "Dataset",
    "Embeddings",
    "Images",
    "LoaderError",
    "Partition",
    "PhotographImages",
    "PhotographOptions",
    "Preprocessing",
    "ResidentImages",
    "ShardedBatchSampler",
    "ShardedPseudoLabelBank",
    "consecutive_batches",
    "dataset_from_arrays",
    "dataset_from_torch",
    "derive_seed",
    "load_dataset",
    "load_embeddings",
    "load_folder",
    "load_imagenet",
    "load_named",
    "mixed_steps",
    "read_split",
    "shuffled_steps",
    "small_image_shape",
    "split_labels",
    "uniform",
    "write_split",
]
