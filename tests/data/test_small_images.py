"""The data sets of small images: files in their true formats, missing ones, damaged ones, downloads."""

import http.server
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from r2d2fast.data import consecutive_batches, small_images
from r2d2fast.data.errors import DataError
from r2d2fast.data.resident import channel_statistics
from r2d2fast.data.small_images import FASHION_MNIST_PACKAGE, SMALL_DATASETS, load_dataset
from tests.data import stand_ins

CPU = torch.device("cpu")
NOWHERE = Path("/nonexistent")
REAL_FASHION_MNIST = FASHION_MNIST_PACKAGE


@pytest.fixture(autouse=True)
def _no_package(monkeypatch):
    """Stand-ins alone, whatever is installed."""
    monkeypatch.setattr(small_images, "FASHION_MNIST_PACKAGE", NOWHERE)


def load(name, root, download=False):
    return load_dataset(name, root, CPU, download)


def every_image(images):
    """As evaluation sees them."""
    (batch,) = images.batches(consecutive_batches(torch.arange(len(images)), 10**6), None, 0)
    return batch


def check(dataset, train, train_labels, test, test_labels):
    """The data set is that of these pixels, uint8 [M, C, H, W], and classes."""
    mean, std = channel_statistics(torch.from_numpy(train))
    for images, pixels in ((dataset.train, train), (dataset.test, test)):
        expected = (torch.from_numpy(pixels).float() - mean[:, None, None]) * (1 / std)[:, None, None]
        assert len(images) == len(pixels)
        assert images.shape == pixels.shape[1:]
        assert torch.equal(every_image(images), expected)
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert dataset.train_labels.tolist() == list(train_labels)
    assert dataset.test_labels.tolist() == list(test_labels)
    assert list(dataset.train_names) == [str(number) for number in range(len(train))]


# --- digits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load("digits", NOWHERE)


def pixels_of(dataset, images):
    """The bytes 0 … 16, from images normalised so that the background is the least value."""
    normalised = every_image(images).flatten(1)
    blank, full = (float(every_image(dataset.train).min()), float(every_image(dataset.train).max()))
    return ((normalised - blank) * (16 / (full - blank))).round().to(torch.int64).tolist()


def test_digits_has_1437_images_to_train_on_and_a_stratified_360_to_test_on(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.shape == digits.test.shape == (1, 8, 8)
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert list(digits.class_names) == list("0123456789")
    assert digits.num_classes == 10
    shares = torch.bincount(digits.test_labels) / torch.bincount(digits.train_labels)
    assert ((shares - 360 / 1437).abs() < 0.02).all()


def test_digits_to_train_and_to_test_on_are_together_all_digits_each_with_its_label(digits):
    pixels, labels = load_digits(return_X_y=True)
    found = [
        (tuple(image), label)
        for images, classes in ((digits.train, digits.train_labels), (digits.test, digits.test_labels))
        for image, label in zip(pixels_of(digits, images), classes.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(zip(map(tuple, pixels.astype(int).tolist()), labels.tolist(), strict=True))


def test_digits_are_normalised_by_their_training_images(digits):
    std, mean = torch.std_mean(every_image(digits.train))
    assert abs(mean) < 1e-6
    assert abs(std - 1) < 1e-6


def test_the_test_split_of_digits_is_the_same_in_every_run(digits):
    torch.manual_seed(123)
    again = load("digits", NOWHERE)
    assert torch.equal(every_image(digits.test), every_image(again.test))
    # Written down, so that a change of the split, which makes old errors incomparable, does not go unseen.
    assert digits.test_labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_an_unknown_name_is_refused_with_the_accepted_ones():
    with pytest.raises(DataError, match=r"'mnits'; accepted: digits, mnist, fashion-mnist, svhn, cifar10, cifar100$"):
        load("mnits", NOWHERE)


# --- files in their true formats ----------------------------------------------------------------------------------


def test_cifar10(tmp_path, monkeypatch):
    stand_ins.cifar10(tmp_path, monkeypatch)
    dataset = load("cifar10", tmp_path)
    check(
        dataset,
        np.concatenate([stand_ins.images(20, (3072,), seed) for seed in range(5)]).reshape(-1, 3, 32, 32),
        [(number * 3 + seed) % 10 for seed in range(5) for number in range(20)],
        stand_ins.images(20, (3072,), 5).reshape(-1, 3, 32, 32),
        [(number * 3 + 5) % 10 for number in range(20)],
    )
    assert dataset.class_names[:3] == ["airplane", "automobile", "bird"]
    assert dataset.num_classes == 10


def test_cifar100_has_its_fine_labels(tmp_path, monkeypatch):
    stand_ins.cifar100(tmp_path, monkeypatch)
    dataset = load("cifar100", tmp_path)
    check(
        dataset,
        stand_ins.images(200, (3072,), 0).reshape(-1, 3, 32, 32),
        [number * 7 % 100 for number in range(200)],
        stand_ins.images(100, (3072,), 1).reshape(-1, 3, 32, 32),
        [(number * 7 + 1) % 100 for number in range(100)],
    )
    assert (dataset.num_classes, dataset.class_names[99]) == (100, "name99")


def test_svhn_whose_class_10_is_the_digit_0(tmp_path, monkeypatch):
    stand_ins.svhn(tmp_path, monkeypatch)
    check(
        load("svhn", tmp_path),
        stand_ins.images(60, (3, 32, 32), 0),
        [number % 10 for number in range(60)],
        stand_ins.images(30, (3, 32, 32), 1),
        [(number + 1) % 10 for number in range(30)],
    )


IDX = {"mnist": MNIST, "fashion-mnist": FashionMNIST}


def check_mnist(dataset):
    check(
        dataset,
        stand_ins.images(50, (1, 28, 28), 0),
        [number % 10 for number in range(50)],
        stand_ins.images(20, (1, 28, 28), 1),
        [(number + 1) % 10 for number in range(20)],
    )


@pytest.mark.parametrize("name", IDX)
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_and_fashion_mnist_plain_and_packed(tmp_path, name, packed):
    stand_ins.mnist(tmp_path / IDX[name].__name__ / "raw", packed=packed)
    dataset = load(name, tmp_path)
    check_mnist(dataset)
    assert dataset.class_names[9] == {"mnist": "9", "fashion-mnist": "Ankle boot"}[name]
    assert dataset.num_classes == 10


def test_plain_idx_files_are_those_that_torchvision_reads(tmp_path):
    stand_ins.mnist(tmp_path / "MNIST" / "raw", packed=False)
    theirs = MNIST(tmp_path, train=True)
    check_mnist(load("mnist", tmp_path))
    assert np.array_equal(theirs.data.numpy(), stand_ins.images(50, (28, 28), 0))


def test_fashion_mnist_is_found_in_debians_package_where_the_root_has_none(tmp_path, monkeypatch):
    stand_ins.mnist(tmp_path / "package", packed=True)
    monkeypatch.setattr(small_images, "FASHION_MNIST_PACKAGE", tmp_path / "package")
    check_mnist(load("fashion-mnist", tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_fashion_mnist_of_the_root_comes_before_debians_package(tmp_path, monkeypatch):
    stand_ins.mnist(tmp_path / "package", packed=True, train=30)
    stand_ins.mnist(tmp_path / "root" / "FashionMNIST" / "raw", packed=False)
    monkeypatch.setattr(small_images, "FASHION_MNIST_PACKAGE", tmp_path / "package")
    check_mnist(load("fashion-mnist", tmp_path / "root"))


@pytest.mark.skipif(not REAL_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.setattr(small_images, "FASHION_MNIST_PACKAGE", REAL_FASHION_MNIST)
    dataset = load("fashion-mnist", NOWHERE)
    assert (len(dataset.train), len(dataset.test), dataset.train.shape) == (60_000, 10_000, (1, 28, 28))
    assert torch.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    # The published mean and deviation are 0.2860 and 0.3530 of 255; the first training image is an ankle boot.
    first = dataset.train.batches(consecutive_batches(torch.arange(1000), 1000), None, 0)
    background = float(next(first).min())
    assert abs(background - -0.2860 / 0.3530) < 1e-3
    assert dataset.class_names[int(dataset.train_labels[0])] == "Ankle boot"


# --- missing and damaged files ------------------------------------------------------------------------------------

FIRST_FILE = {
    "mnist": ("MNIST/raw", "train-images-idx3-ubyte"),
    "fashion-mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte"),
    "svhn": (".", "train_32x32.mat"),
    "cifar10": (".", "cifar-10-batches-py/data_batch_1"),
    "cifar100": (".", "cifar-100-python/train"),
}


def stand_in(name, root, patch):
    if name in IDX:
        stand_ins.mnist(root / IDX[name].__name__ / "raw", packed=False)
    else:
        getattr(stand_ins, name)(root, patch)


def test_every_data_set_of_files_is_tested():
    assert set(FIRST_FILE) == set(SMALL_DATASETS) - {"digits"}


@pytest.mark.parametrize("name", FIRST_FILE)
def test_missing_files_are_named_with_what_to_put_where(tmp_path, name):
    folder, file = FIRST_FILE[name]
    with pytest.raises(DataError, match="--download") as raised:
        load(name, tmp_path)
    message = str(raised.value)
    assert message.startswith(f"missing in {tmp_path / folder}: {file}, ")
    assert str(tmp_path) in message.partition("; ")[2]
    assert "http" in message
    assert ("dataset-fashion-mnist" in message) == (name == "fashion-mnist")


@pytest.mark.parametrize("name", FIRST_FILE)
def test_one_missing_file_is_named_alone(tmp_path, monkeypatch, name):
    stand_in(name, tmp_path, monkeypatch)
    load(name, tmp_path)
    folder, file = FIRST_FILE[name]
    (tmp_path / folder / file).unlink()
    with pytest.raises(DataError) as raised:
        load(name, tmp_path)
    assert str(raised.value).startswith(f"missing in {tmp_path / folder}: {file}; ")


@pytest.mark.parametrize("name", FIRST_FILE)
@pytest.mark.parametrize("damage", ["cut off", "empty", "other"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, monkeypatch, name, damage):
    stand_in(name, tmp_path, monkeypatch)
    path = tmp_path.joinpath(*FIRST_FILE[name])
    content = path.read_bytes()
    path.write_bytes({"cut off": content[:-1], "empty": b"", "other": b"<html>404</html>" * 100}[damage])
    with pytest.raises(DataError, match=r"is damaged.*Remove it and") as raised:
        load(name, tmp_path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("damage", ["cut off", "other", "one bit"])
def test_a_damaged_packed_file_is_named(tmp_path, damage):
    stand_ins.mnist(tmp_path / "MNIST" / "raw", packed=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut off": content[:-100],
            "other": b"<html>404</html>",
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[damage]
    )
    with pytest.raises(DataError, match=r"is damaged.*Remove it and put the four files of http") as raised:
        load("mnist", tmp_path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("labels", [[1, 2, 3], [0] * 49 + [10], []])
def test_classes_that_do_not_belong_to_the_images_are_refused(tmp_path, labels):
    folder = tmp_path / "MNIST" / "raw"
    stand_ins.mnist(folder, packed=False)
    stand_ins.write_idx(folder / "train-labels-idx1-ubyte", np.array(labels, dtype=np.uint8), packed=False)
    with pytest.raises(
        DataError, match=rf"train-labels-idx1-ubyte has {len(labels)} classes.*for 50 images of 10 classes"
    ):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    stand_in(name, tmp_path, monkeypatch)

    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom no permission stops.
    monkeypatch.setattr(small_images, "check_integrity", denied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"^cannot read .*(data_batch_1|train-images-idx3-ubyte): Permission denied$"):
        load(name, tmp_path)


# --- downloads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serves the folder ``served``; its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_args):
            """torchvision looks where an address leads and hangs up."""

    with Server(("127.0.0.1", 0), partial(Quiet, directory=folder)) as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()
        thread.join()


def offer(name, tmp_path, address, patch):
    """The stand-in of a data set as its page offers it, and torchvision told so; returns its files, unpacked."""
    source, served = tmp_path / "source", tmp_path / "served"
    if name in IDX:
        kind = IDX[name]
        stand_ins.mnist(source, packed=True)
        shutil.copytree(source, served, dirs_exist_ok=True)
        stand_ins.accept_mnist(kind, source, patch)
        patch.setattr(kind, "mirrors", [f"{address}/"])
    elif name == "svhn":
        stand_ins.svhn(served, patch)
        patch.setattr(
            SVHN,
            "split_list",
            {split: [f"{address}/{file}", file, md5] for split, (_, file, md5) in SVHN.split_list.items()},
        )
    else:
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        getattr(stand_ins, name)(source, patch)
        stand_ins.archive(source / kind.base_folder, served / kind.filename)
        patch.setattr(kind, "url", f"{address}/{kind.filename}")
        patch.setattr(kind, "tgz_md5", stand_ins.md5(served / kind.filename))


@pytest.mark.parametrize("name", FIRST_FILE)
def test_missing_files_are_downloaded_once(tmp_path, monkeypatch, server, name):
    offer(name, tmp_path, server, monkeypatch)
    root = tmp_path / "root"
    first = load(name, root, download=True)
    shutil.rmtree(tmp_path / "served")
    for again in (load(name, root, download=True), load(name, root)):
        assert torch.equal(every_image(again.train), every_image(first.train))
        assert torch.equal(again.test_labels, first.test_labels)


@pytest.mark.parametrize("name", FIRST_FILE)
def test_a_download_that_fails_says_what_to_do_by_hand(tmp_path, monkeypatch, server, name):
    offer(name, tmp_path, server, monkeypatch)
    for path in (tmp_path / "served").iterdir():
        path.unlink()
    root = tmp_path / "root"
    with pytest.raises(
        DataError, match=rf"^the download into {root} failed: .*404.*Try again, or (put|unpack) .*{server}"
    ):
        load(name, root, download=True)


def test_a_full_disk_stops_the_download_with_its_reason(tmp_path, monkeypatch, server):
    offer("svhn", tmp_path, server, monkeypatch)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", full)
    with pytest.raises(DataError, match="No space left on device"):
        load("svhn", tmp_path / "root", download=True)


@pytest.mark.parametrize("name", ["svhn", "cifar10"])
def test_a_damaged_file_is_downloaded_again(tmp_path, monkeypatch, server, name):
    offer(name, tmp_path, server, monkeypatch)
    root = tmp_path / "root"
    first = load(name, root, download=True)
    path = root.joinpath(*FIRST_FILE[name])
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(every_image(load(name, root, download=True).train), every_image(first.train))
