"""Which images or embeddings, and labels, a configuration trains on."""

from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from r2d2fast.data import (
    DataError,
    Dataset,
    Embeddings,
    Images,
    PhotographImages,
    PhotographOptions,
    Preprocessing,
    ResidentImages,
    load_dataset,
    load_embeddings,
    load_folder,
    load_imagenet,
    load_named,
    read_split,
    small_image_shape,
    split_labels,
)
from r2d2fast.models import own_images
from r2d2fast.train.checks import check_photographs, check_small_images
from r2d2fast.train.config import Config
from r2d2fast.train.errors import ConfigError
from r2d2fast.train.ranks import Ranks
from r2d2fast.train.recipes import NAMED


def load_data(config: Config, ranks: Ranks) -> tuple[Dataset, Tensor]:
    """The data set, made for this rank's device, and the labels of its split: int64 ``[M]``, −1 for an unlabelled sample.

    Raises ConfigError, with what to put where, if something is missing or does not fit.
    """
    try:
        dataset = _load(config, ranks)
        return dataset, labels_of(config, dataset)
    except DataError as error:
        raise ConfigError(str(error)) from error


def _load(config: Config, ranks: Ranks) -> Dataset:
    if config.dataset in ("imagenet", "folder"):
        shape = small_image_shape(config.data_dir) if config.dataset == "folder" else None
        if shape is None:
            check_photographs(config)
        else:
            check_small_images(config, max(shape[1:]))
        options = _photograph_options(config)
        if config.dataset == "imagenet":
            return load_imagenet(config.data_dir, ranks.device, options)
        dataset = load_folder(config.data_dir, ranks.device, options, config.test_fraction)
        if not isinstance(dataset.train, ResidentImages):
            return dataset
        return placed(dataset, config, ranks)
    if config.dataset.startswith(NAMED):
        return placed(load_named(config.dataset, config.data_dir, config.download, config.test_fraction), config, ranks)
    if config.dataset == "embeddings":
        return load_embeddings(config.data_dir, ranks.device)
    if config.download and ranks.rank > 0:
        ranks.barrier()  # rank 0 downloads
    dataset = load_dataset(config.dataset, config.data_dir, ranks.device, config.download and ranks.rank == 0)
    if config.download and ranks.rank == 0:
        ranks.barrier()
    return placed(dataset, config, ranks)


def placed(dataset: Dataset, config: Config, ranks: Ranks) -> Dataset:
    """A data set with batches made for this rank's device, as ``config`` and the weights that it begins with ask for."""
    if isinstance(dataset.train, PhotographImages):
        check_photographs(config)
    return replace(dataset, train=_placed(dataset.train, config, ranks), test=_placed(dataset.test, config, ranks))


def _placed(images: Images, config: Config, ranks: Ranks) -> Images:
    if isinstance(images, PhotographImages):
        return PhotographImages(images.files, ranks.device, _photograph_options(config))
    assert isinstance(images, ResidentImages | Embeddings)
    images = images.to(ranks.device)
    own = images_of_weights(config, images.shape[0])
    if own is None or isinstance(images, Embeddings):
        return images
    return images.normalised_by(torch.tensor(own.mean) * own.divisor, torch.tensor(own.std) * own.divisor)


def _photograph_options(config: Config) -> PhotographOptions:
    """How photographs become batches: for pretrained weights as these were made with."""
    options = PhotographOptions(config.image_size, config.resize, config.workers, config.on_bad_image, config.decoder)
    own = images_of_weights(config, channels=3)
    if own is None:
        return options
    mean, std = (tuple(one * own.divisor / 255 for one in values) for values in (own.mean, own.std))
    return replace(options, interpolation=own.interpolation, mean=mean, std=std)


def images_of_weights(config: Config, channels: int) -> Preprocessing | None:
    """How the images became batches that the pretrained weights were made with: as a run's ``network.safetensors`` says, or, of
    other files, the library of the backbone. None where neither does, or they were images of another number of channels."""
    if config.pretrained is None:
        return None
    about, own = _metadata(config.pretrained), own_images(config.backbone)
    if "preprocessing" in about:
        found = Preprocessing.from_json(about["preprocessing"])
    elif own is not None:
        shape = (3, own.image_size, own.image_size)
        found = Preprocessing("photographs", shape, own.mean, own.std, 255, own.resize, own.interpolation)
    else:
        return None
    return found if len(found.mean) == channels else None


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file; none of others, nor of one that cannot be read, which is told where its weights are needed."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def labels_of(config: Config, dataset: Dataset) -> Tensor:
    """The labels of the split of ``config``. Raises ConfigError for one that does not fit, DataError for a damaged file."""
    if config.split_file is not None:
        return read_split(config.split_file, dataset.train_names, dataset.class_names)
    per_class = config.num_labels_per_class
    if config.num_labels == 0 and not per_class:
        return dataset.train_labels.clone()
    assert config.split is not None
    wanted = per_class * (dataset.num_classes if len(per_class) == 1 else 1) or config.num_labels
    try:
        return split_labels(dataset.train_labels, dataset.num_classes, wanted, config.split)
    except ValueError as error:
        raise ConfigError(f"--num-labels{'-per-class' * bool(per_class)}: {error}") from error
