"""Which images or embeddings, and labels, a configuration trains on."""

from dataclasses import replace

from torch import Tensor

from r2d2fast.data import (
    DataError,
    Dataset,
    Embeddings,
    Images,
    PhotographImages,
    PhotographOptions,
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
        if isinstance(dataset.train, ResidentImages) and ranks.rank > 0:
            dataset.train.bad_images.clear()  # every rank has decoded all images, and they are counted over the ranks
        return dataset
    if config.dataset.startswith(NAMED):
        return placed(load_named(config.dataset, config.data_dir, config.download, config.test_fraction), config, ranks)
    if config.dataset == "embeddings":
        return load_embeddings(config.data_dir, ranks.device)
    if config.download and ranks.rank > 0:
        ranks.barrier()  # rank 0 downloads
    dataset = load_dataset(config.dataset, config.data_dir, ranks.device, config.download and ranks.rank == 0)
    if config.download and ranks.rank == 0:
        ranks.barrier()
    return dataset


def placed(dataset: Dataset, config: Config, ranks: Ranks) -> Dataset:
    """A data set of what a program has, with batches made for this rank's device, and of photographs as ``config`` says."""
    if isinstance(dataset.train, PhotographImages):
        check_photographs(config)
    return replace(dataset, train=_placed(dataset.train, config, ranks), test=_placed(dataset.test, config, ranks))


def _placed(images: Images, config: Config, ranks: Ranks) -> Images:
    if isinstance(images, PhotographImages):
        return PhotographImages(images.files, ranks.device, _photograph_options(config))
    assert isinstance(images, ResidentImages | Embeddings)
    return images.to(ranks.device)


def _photograph_options(config: Config) -> PhotographOptions:
    """How photographs become batches: for pretrained weights as these were made with."""
    options = PhotographOptions(config.image_size, config.resize, config.workers, config.on_bad_image, config.decoder)
    own = None if config.pretrained is None else own_images(config.backbone)
    return options if own is None else replace(options, interpolation=own.interpolation, mean=own.mean, std=own.std)


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
