"""``python -m bench.augmentation``: augmented images a second of one core, resident images against the usual pipeline.

That is PIL images one by one through torchvision's transforms, collected by a DataLoader without workers.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.table import machine_list, verdict
from r2d2fast import machine
from r2d2fast.data import Augmentation, Batch, ResidentImages
from r2d2fast.tables import markdown_table
from r2d2fast.train.threads import cpu_threads

Run = Callable[[], Iterator[Tensor]]

TARGET = 10.0
"""The project's own target: times as many images a second and core."""
RECIPES = {
    "CIFAR-10, stages 1 and 3": Augmentation(translate=4, border="reflect", flip=True, cutout=16),
    "CIFAR-10, stage 2": Augmentation(translate=4, border="reflect", flip=True),
}
BATCHES = (128, 512)
SAMPLES = 50_000
"""Images in the data set: far more than caches hold."""
SIZE = 32
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""The normalisation of bytes that both apply; any would do."""


def pixels(samples: int) -> np.ndarray:
    """uint8 ``[samples, 32, 32, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (samples, SIZE, SIZE, 3), dtype=np.uint8)


class OneByOne(Dataset[Tensor]):
    """What torchvision's CIFAR10 does for one image."""

    def __init__(self, data: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, sample: int) -> Tensor:
        return self.transform(Image.fromarray(self.data[sample]))


def pipeline(augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """The same augmentation by torchvision's transforms, with a cutout after DeVries & Taylor (2017)."""

    def cut(image: Tensor) -> Tensor:
        row, column = torch.randint(SIZE, (2,)).tolist()
        half = augmentation.cutout // 2
        image[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
        return image

    steps: list[Callable] = [
        transforms.RandomCrop(SIZE, padding=augmentation.translate, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([one / 255 for one in MEAN], [one / 255 for one in STD]),
    ]
    return transforms.Compose([*steps, cut] if augmentation.cutout else steps)


def prepare(data: np.ndarray, augmentation: Augmentation, batch: int, images: int) -> dict[str, Run]:
    """The passes of both over ``images`` random images of ``data``, uint8 ``[M, 32, 32, 3]``."""
    resident = ResidentImages(
        torch.from_numpy(data).permute(0, 3, 1, 2), torch.tensor(MEAN), torch.tensor(STD), torch.device("cpu")
    )
    one_by_one = OneByOne(data, pipeline(augmentation))

    def ours() -> Iterator[Tensor]:
        index = torch.randperm(len(data))[:images]
        return resident.batches([Batch(part, part, len(part)) for part in index.split(batch)], augmentation, 0)

    def theirs() -> Iterator[Tensor]:
        return iter(DataLoader(one_by_one, batch, sampler=torch.randperm(len(data))[:images].tolist()))

    return {"r2d2fast.data.ResidentImages": ours, "torchvision.transforms, DataLoader": theirs}


def measure(runs: dict[str, Run], images: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time an image, round by round and in turn, after one pass that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            for _ in run():
                pass
            seconds[name].append((time.process_time() - start) / images)
    return {name: samples[1:] for name, samples in seconds.items()}


def main(*, images: int = 4096, rounds: int = 15) -> None:
    """Augmented images a second of one core: resident images against PIL images through torchvision's transforms.

    Args:
        images: Images in a timed pass.
        rounds: Timed passes of each, taken in turn.
    """
    about = machine.describe()
    data = pixels(SAMPLES)
    rows = []
    ratios = {}
    with cpu_threads(1):
        for recipe, augmentation in RECIPES.items():
            for batch in BATCHES:
                seconds = measure(prepare(data, augmentation, batch, images), images, rounds)
                for name, samples in seconds.items():
                    median = statistics.median(samples)
                    rows.append((recipe, str(batch), name, f"{median * 1e6:.2f}", f"{1 / median:.0f}"))
                ours, theirs = seconds.values()
                ratios[recipe, batch] = statistics.median(other / one for one, other in zip(ours, theirs, strict=True))

    print(machine_list(about), end="\n\n")
    print(
        f"{SAMPLES} images of 3 x {SIZE} x {SIZE}, one thread; medians of {rounds} rounds of processor time.",
        end="\n\n",
    )
    print(markdown_table(("augmentation", "batch", "by", "median µs", "images/s/core"), rows), end="\n\n")
    ratio_rows = [
        (recipe, str(batch), f"{ratio:.1f}", f"≥ {TARGET:.1f}", verdict(ratio >= TARGET))
        for (recipe, batch), ratio in ratios.items()
    ]
    print(markdown_table(("augmentation", "batch", "times as many images/s/core", "target", ""), ratio_rows))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.augmentation", config=(tyro.conf.FlagCreatePairsOff,))
