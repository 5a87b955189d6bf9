"""Data sets of torchvision and Hugging Face by their names: ``torchvision:EuroSAT``, ``hf:cifar10``."""

import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.utils.data import Subset

from r2d2fast.data.dataset import Dataset
from r2d2fast.data.errors import DataError
from r2d2fast.data.in_memory import classes_of, dataset_from_torch
from r2d2fast.data.split import check_test_fraction, proportional_counts, split_labels

# How torchvision and Hugging Face call the parts, the first that is there.
TRAINS, TESTS = ("train+unlabeled", "train", "trainval"), ("test", "val", "valid", "validation")
ARCHIVES = re.compile(r"https?://[^\s\"'<>`]+\.(?:zip|tar|tgz|gz|mat|bz2|xz)")
FROM_PYTHON = (
    "From Python any data set is taken: data = r2d2fast.dataset_from_torch(train, test), then "
    "r2d2fast.train_run(r2d2fast.recipe_for(data).config, data)"
)


@lru_cache(maxsize=1)
def load_named(name: str, root: Path, download: bool, test_fraction: float) -> Dataset:
    """The data set ``name``, on the CPU. Of one without a part for tests, a share of each class is kept for them.

    Args:
        name: ``torchvision:CLASS``; or ``hf:NAME``, of the hub or a folder: one that ``save_to_disk`` has written, or that
            ``datasets.load_dataset`` takes, of Parquet files or of images in folders by class.
        root: of torchvision's files. Hugging Face has a cache of its own.
        download: what is not there yet.
        test_fraction: the share.

    Raises DataError, with what to fetch, for a name that is unknown or files that are missing.
    """
    check_test_fraction(test_fraction)
    library, _, own_name = name.partition(":")
    train, test = (_of_torchvision if library == "torchvision" else _of_hugging_face)(own_name, root, download)
    if test is not None or test_fraction == 0:
        return dataset_from_torch(train, test)
    labels = classes_of(train)
    counts = torch.bincount(labels[labels >= 0]).tolist()
    held = proportional_counts(counts, max(int(test_fraction * sum(counts)), len(counts)))
    held = [min(tested, count - 1) for tested, count in zip(held, counts, strict=True)]  # one of each is to train on
    tested = split_labels(labels, len(counts), held, split=0) >= 0
    parts = [Subset(train, part.nonzero().flatten().tolist()) for part in (~tested, tested)]
    dataset = dataset_from_torch(*parts)
    return Dataset(**vars(dataset) | {"held_out": int(tested.sum())})


def _of_torchvision(name: str, root: Path, download: bool) -> tuple[Any, Any]:
    from torchvision import datasets

    kinds = {one: getattr(datasets, one) for one in datasets.__all__ if one != "VisionDataset"}
    parameters = {one: inspect.signature(kind).parameters for one, kind in kinds.items()}
    wanted = {one: _beside_folder(taken) for one, taken in parameters.items() if "root" in taken}
    if name not in wanted:
        folded = {one.lower(): one for one in wanted}
        nearest = "".join(f" Did you mean {folded[one]}?" for one in get_close_matches(name.lower(), folded, 1))
        alone = ", ".join(sorted(one for one, more in wanted.items() if not more))
        raise DataError(
            f"--dataset torchvision:{name}: torchvision reads no data set of this name from a folder.{nearest} Those that need "
            f"nothing but the folder: {alone}. {FROM_PYTHON}"
        )
    if wanted[name]:
        given = ", ".join(f"{one}=..." for one in wanted[name])
        raise DataError(
            f"--dataset torchvision:{name}: it needs {' and '.join(wanted[name])} beside its folder, which no flag gives. "
            f'{FROM_PYTHON}, with train = torchvision.datasets.{name}("{root}", {given})'
        )
    kind, parts = kinds[name], [dict[str, Any]()]
    if "train" in parameters[name]:
        parts = [{"train": True}, {"train": False}]
    elif "split" in parameters[name]:
        source = inspect.getsource(kind)
        named = [next((one for one in names if f'"{one}"' in source), names[-1]) for names in (TRAINS, TESTS)]
        parts = [{"split": one} for one in named]
    downloads = "download" in parameters[name]
    try:
        with _alone(root) if download else nullcontext():
            opened = [kind(root, **part, **{"download": download} if downloads else {}) for part in parts]
    except (RuntimeError, OSError, ValueError) as error:
        calls = "; ".join(f'd.{name}("{root}", {_call(part)})' for part in parts)
        addresses = ", ".join(sorted(set(ARCHIVES.findall(inspect.getsource(kind)))))
        fetched = (
            f"--download fetches it into {root}; without a network, fetch it elsewhere by: python -c 'import "
            f"torchvision.datasets as d; {calls}'{f' ({addresses})' if addresses else ''} and copy that folder"
        )
        itself = f"torchvision does not download it: put its files into {root}"
        raise DataError(
            f"--dataset torchvision:{name}: {' '.join(str(error).split()).rstrip('.'):.200}. {fetched if downloads else itself}"
        ) from error
    return opened[0], opened[1] if len(opened) > 1 else None


def _alone(root: Path) -> FileLock:
    """The processes of a run download one after the other."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".download.lock")


def _beside_folder(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """What else a data set has to be told."""
    required = [one for one in parameters.values() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return [one.name for one in required if one.name != "root"]


def _call(part: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in (part | {"download": True}).items())


def _of_hugging_face(name: str, root: Path, download: bool) -> tuple[Any, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("--dataset hf:NAME needs datasets: pip install 'r2d2fast[huggingface]'") from error
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            only_here = datasets.DownloadConfig(local_files_only=not download)
            offline = datasets.config.HF_HUB_OFFLINE
            datasets.config.HF_HUB_OFFLINE = offline or not (download or folder.exists())
            try:
                found = datasets.load_dataset(name, download_config=only_here)
            finally:
                datasets.config.HF_HUB_OFFLINE = offline
    except Exception as error:  # of many libraries' kinds
        elsewhere = f'python -c \'import datasets; datasets.load_dataset("{name}").save_to_disk("DIR")\''
        raise DataError(
            f"--dataset hf:{name}: {' '.join(str(error).split()):.200}. --download fetches it into the cache of datasets; "
            f"without a network, elsewhere: {elsewhere}; copy DIR and take --dataset hf:DIR"
        ) from error
    if not isinstance(found, dict):
        return found, None
    train, test = (next((found[one] for one in names if one in found), None) for names in (TRAINS, TESTS))
    if train is None:
        raise DataError(f"--dataset hf:{name} has the parts {', '.join(found)}, and none of {', '.join(TRAINS)}")
    return train, test
