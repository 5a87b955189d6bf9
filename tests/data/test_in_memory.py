"""Data sets of arrays, and of those that PyTorch, torchvision and Hugging Face have."""

import ast
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR10, EMNIST, FakeData, ImageFolder
from torchvision.transforms import ToTensor

from r2d2fast import dataset_from_arrays, dataset_from_torch, with_index
from r2d2fast.data import DataError, Embeddings, PhotographImages, ResidentImages, consecutive_batches, load_named
from tests.data import stand_ins

Y = np.arange(12) % 3
X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


class Items(Dataset):
    def __init__(self, images, classes=Y):
        self.images, self.classes_ = images, classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.classes_[index]


def everything(images):
    return next(images.batches(consecutive_batches(torch.arange(len(images)), len(images)), None, 0))


def same(one, other):
    return torch.equal(everything(one), everything(other))


@pytest.mark.parametrize(
    "given",
    [
        lambda: dataset_from_arrays(X, Y, X[:4], Y[:4]),
        lambda: dataset_from_arrays(X / 255, torch.from_numpy(Y), X[:4] / 255, Y[:4]),
        lambda: dataset_from_arrays(torch.from_numpy(X).permute(0, 3, 1, 2), Y.tolist(), X[:4], Y[:4]),
        lambda: dataset_from_torch(Items([Image.fromarray(x) for x in X]), Subset(Items(X), range(4))),
        lambda: dataset_from_torch(Items([ToTensor()(Image.fromarray(x)) for x in X]), Items(X[:4])),
        lambda: dataset_from_torch(
            [{"img": x, "fine_label": y} for x, y in zip(X, Y, strict=True)],
            [{"image": x, "label": y} for x, y in zip(X[:5], [*Y[:4], None], strict=True)],
        ),
    ],
)
def test_images_of_one_size_become_the_same_bytes_whatever_has_them(given):
    dataset, expected = given(), dataset_from_arrays(X, Y)
    assert isinstance(dataset.train, ResidentImages)
    assert same(dataset.train, expected.train)
    assert torch.equal(everything(dataset.test), everything(expected.train)[:4])
    assert dataset.train_labels.tolist() == Y.tolist()
    assert dataset.test_labels.tolist() == Y[:4].tolist()
    assert list(dataset.train_names[:2]) == ["0", "1"]
    assert dataset.class_names == ["0", "1", "2"]


def test_grey_images_have_one_channel_and_unlabelled_samples_the_class_minus_1():
    labels = np.where(np.arange(12) < 6, Y, -1)
    grey = X[..., 0].copy()
    grey_tensor = torch.from_numpy(grey)
    first = dataset_from_arrays(grey, labels, class_names=["a", "b", "c"])
    for dataset in (
        first,
        dataset_from_arrays(grey_tensor, labels),
        dataset_from_arrays(grey_tensor[:, None], labels),
        dataset_from_torch(Items([Image.fromarray(x) for x in grey], labels)),
        dataset_from_torch(Items(grey_tensor, labels)),
    ):
        assert dataset.train.shape == (1, 8, 8)
        assert same(dataset.train, first.train)
        assert dataset.train_labels.tolist() == labels.tolist()
        assert len(dataset.test) == 0


@pytest.mark.parametrize("classes", [Y[:4], np.full(4, -1)])
def test_a_part_whose_images_are_all_grey_or_that_has_none_has_the_channels_of_the_other(classes):
    grey = X[:4, ..., 0].copy()
    dataset = dataset_from_torch(
        Items([Image.fromarray(x) for x in X]), Items([Image.fromarray(x) for x in grey], classes)
    )
    expected = dataset_from_arrays(X, Y, np.stack([grey] * 3, -1), Y[:4])
    count = int((classes >= 0).sum())
    assert len(dataset.test) == len(dataset.test_labels) == count
    assert same(dataset.train, expected.train)
    assert dataset.test.shape == (3, 8, 8)
    assert count == 0 or same(dataset.test, expected.test)


def test_vectors_are_embeddings():
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    dataset = dataset_from_arrays(x, Y, x[:3], Y[:3])
    assert isinstance(dataset.train, Embeddings)
    np.testing.assert_array_equal(everything(dataset.train.to(torch.device("cpu"))), x)


def test_images_of_various_sizes_are_photographs(tmp_path):
    images = [Image.fromarray(np.full((40 + n, 60, 3), 20 * n, np.uint8)) for n in range(12)]
    dataset = dataset_from_torch(Items(images))
    assert isinstance(dataset.train, PhotographImages)
    seen = everything(dataset.train)
    assert seen.shape == (12, 3, 224, 224)
    assert (seen.flatten(1).mean(1).diff() > 0).all()


def test_data_sets_of_torchvision_have_classes_and_their_names(tmp_path):
    for name, colour in (("ant", 10), ("bee", 200)):
        (tmp_path / name).mkdir()
        for n in range(3):
            Image.new("RGB", (8, 8), (colour, n, 0)).save(tmp_path / name / f"{n}.png")
    dataset = dataset_from_torch(ImageFolder(tmp_path))
    assert dataset.class_names == ["ant", "bee"]
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset_from_torch(FakeData(20, (3, 8, 8), 2)).train.shape == (3, 8, 8)
    numbered = with_index(ImageFolder(tmp_path, ToTensor()))
    _, classes, index = next(iter(DataLoader(numbered, 6)))
    assert (classes.tolist(), index.tolist()) == ([0, 0, 0, 1, 1, 1], list(range(6)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dataset_from_arrays(3 * X.astype(float), Y), "from 0 to 765; accepted: uint8, or float from 0 to 1"),
        (lambda: dataset_from_arrays(X[..., :2], Y), r"images are uint8 \[12, 8, 8, 2\]; accepted"),
        (lambda: dataset_from_arrays(X, Y[:3]), r"y: int64 \[3\]; accepted: integers \[12\]"),
        (lambda: dataset_from_arrays(X, Y - 2), "y: a class is -2; accepted: numbers from 0, -1 for unknown"),
        (lambda: dataset_from_arrays(X, Y, class_names=["a", "b"]), "a class is 2, and there are 2 names"),
        (lambda: dataset_from_arrays(X, Y * 2), r"samples of each class by number: \[4, 0, 4, 0, 4\]"),
        (lambda: dataset_from_arrays(X, Y, X[:, :4], Y), r"training images are \[8, 8, 3\], test images \[4, 8, 3\]"),
        (lambda: dataset_from_arrays(X, Y, X), "y_test is None; give both, or neither"),
        (lambda: dataset_from_arrays(X, Y, None, Y), "x_test is None; give both, or neither"),
        (lambda: dataset_from_torch(iter(X)), "has to be map-style"),
        (lambda: dataset_from_torch([{"pixels": 3, "label": 0}]), "no image: accepted are 'image', 'img'"),
        (lambda: dataset_from_torch([("text", 0), ("more", 1)]), "an image is a str; accepted"),
    ],
)
def test_what_is_no_data_set_is_said(make, said):
    with pytest.raises(DataError, match=said):
        make()


def test_torchvision_s_by_name(tmp_path, monkeypatch):
    stand_ins.cifar10(tmp_path, monkeypatch, per_file=4)
    dataset = load_named("torchvision:CIFAR10", tmp_path, False, 0.2)
    assert (len(dataset.train), dataset.class_names) == (20, CIFAR10(tmp_path).classes)
    for name, n in (("a", 10), ("b", 30)):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(n):
            Image.new("RGB", (64, 64), (number, n, 0)).save(folder / f"{number}.jpg")
    dataset = load_named("torchvision:EuroSAT", tmp_path, False, 0.2)
    assert isinstance(dataset.train, ResidentImages)
    assert (dataset.class_names, dataset.held_out) == (["a", "b"], 8)
    assert torch.bincount(dataset.test_labels).tolist() == [2, 6]
    assert not list(tmp_path.glob(".*lock"))  # in a folder that may be one's to read alone
    assert torch.bincount(load_named("torchvision:EuroSAT", tmp_path, False, 0.95).train_labels).tolist() == [1, 2]
    for share in (-0.5, 1.5):
        with pytest.raises(DataError, match=f"--test-fraction is {share}; accepted: at least 0"):
            load_named("torchvision:EuroSAT", tmp_path, False, share)


def test_stl10_brings_its_unlabelled_images_along(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 10), ("test", 10), ("unlabeled", 15)):
        np.full(count * 3 * 96 * 96, count, np.uint8).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            (1 + np.arange(count, dtype=np.uint8)).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)
    dataset = load_named("torchvision:STL10", tmp_path, False, 0.2)
    assert dataset.train.shape == (3, 96, 96)
    assert dataset.train_labels.tolist() == [*range(10), *[-1] * 15]


def test_what_is_missing_is_named_with_what_fetches_it(tmp_path):
    with pytest.raises(DataError) as error:
        load_named("torchvision:EuroSAT", tmp_path, False, 0.2)
    assert "--download fetches it" in str(error.value)
    assert "/EuroSAT.zip" in str(error.value)
    _, command = shlex.split(re.search(r"python (-c '.*?')", str(error.value))[1])
    assert ast.unparse(ast.parse(command)).endswith(f"d.EuroSAT({str(tmp_path)!r}, download=True)")
    with pytest.raises(DataError, match=r"any class folder .* torchvision does not download it: put its files into"):
        load_named("torchvision:ImageFolder", tmp_path, False, 0.2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EuroSat", r"no data set of this name from a folder\. Did you mean EuroSAT\?.* the folder: .*EuroSAT"),
        (
            "Zork",
            r"no data set of this name from a folder\. Those that need nothing but the folder: ((?!EMNIST).)*\. From",
        ),
        ("EMNIST", r"it needs split beside its folder, .* train = torchvision.datasets.EMNIST\(.*, split=\.\.\.\)"),
        ("UCF101", "it needs annotation_path and frames_per_clip beside"),
        ("FakeData", "no data set of this name from a folder"),
    ],
)
def test_names_of_torchvision_s_that_are_not_taken(name, said, tmp_path):
    with pytest.raises(DataError, match=f"torchvision:{name}: .*{said}") as error:
        load_named(f"torchvision:{name}", tmp_path, False, 0.2)
    assert "dataset_from_torch(train, test), then r2d2fast.train_run(" in str(error.value)


def test_what_the_message_says_of_emnist_works(tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "test"):
        for kind, values in (("images-idx3", np.zeros((20, 28, 28), np.uint8)), ("labels-idx1", np.arange(20) % 10)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (raw / f"emnist-digits-{part}-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    train, test = (EMNIST(str(tmp_path), split="digits", train=one) for one in (True, False))
    data = dataset_from_torch(train, test)
    assert (data.train.shape, len(data.test), data.num_classes) == ((1, 28, 28), 20, 10)


@pytest.mark.extra("datasets")
def test_hugging_face_s_by_name(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    part = datasets.Dataset.from_dict({"img": [Image.fromarray(x) for x in X], "label": Y.tolist()}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select(range(6))}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    part.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = dataset_from_arrays(X, Y)
    for name in ("saved", "parquet"):
        dataset = load_named(f"hf:{tmp_path / name}", tmp_path, False, 0.2 if name == "saved" else 0.0)
        assert dataset.class_names == ["a", "b", "c"]
        assert same(dataset.train, expected.train)
        assert len(dataset.test) == (6 if name == "saved" else 0)
    item = with_index(part)[4]
    assert (item["label"], item["index"]) == (1, 4)
    with pytest.raises(
        DataError, match=r"hf:no-such-set: .*save_to_disk\(\"DIR\"\)'; copy DIR and take --dataset hf:DIR"
    ):
        load_named("hf:no-such-set", tmp_path, False, 0.2)
