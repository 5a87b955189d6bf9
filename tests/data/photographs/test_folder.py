"""Data sets of image files: what a folder holds, and the batches made of it."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.errors import DataError
from r2d2fast.data.folder import load_folder, load_imagenet
from r2d2fast.data.names import Names
from r2d2fast.data.photographs.crop import RANDOM_NUMBERS, random_rectangle
from r2d2fast.data.photographs.decode import BadImageError
from r2d2fast.data.photographs.images import FolderFiles, PhotographImages
from r2d2fast.data.photographs.options import MEAN, STD, PhotographOptions
from r2d2fast.data.photographs.tree import read_tree
from r2d2fast.data.random_numbers import uniform
from tests.data.keyed import keyed
from tests.data.small_photographs import encoded, piece, pixels, write_class_folders, write_tree

CPU = torch.device("cpu")
FLIP = Augmentation(flip=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


def order(*batches):
    return [keyed(batch) for batch in batches]


def load(root, **options):
    return load_folder(root, CPU, PhotographOptions(32, 40, **options))


def touch(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(piece(number)))


# --- layouts


def test_class_folders(root):
    data = load(root)
    assert list(data.class_names) == ["china", "flower"]
    assert data.num_classes == 2
    assert data.train_names[:2] == ["china/000.jpg", "china/002.jpg"]
    assert (len(data.train), len(data.test), len(data.train_names)) == (12, 6, 12)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_labels.tolist() == [0] * 3 + [1] * 3
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train.shape == (3, 32, 32)


def test_files_that_are_no_images_hidden_ones_and_deeper_folders(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    train = tmp_path / "copy" / "train"
    (train / "china" / "readme.txt").write_text("x")
    touch(train / "china" / "._000.jpg")
    touch(train / ".cache" / "thumbnail.jpg")
    touch(train / "china" / "deeper" / "A.JPEG")
    assert set(load(tmp_path / "copy").train_names) == set(load(root).train_names) | {"china/deeper/A.JPEG"}


def test_test_images_are_in_test_where_there_is_no_val(root, tmp_path):
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.copytree(root / "val", tmp_path / "test")
    assert load(tmp_path).test_labels.tolist() == [0] * 3 + [1] * 3
    write_class_folders(tmp_path / "val", 2)
    assert load(tmp_path).test_labels.tolist() == [0, 1]


def test_a_label_file_with_unlabelled_images_numbers_and_spaces(tmp_path):
    for number in range(30):
        touch(tmp_path / f"image {number}.jpg", number)
    lines = [f"image {number}.jpg {(10, 9)[number % 2]}" for number in range(20)]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n\n")
    data = load(tmp_path)
    # By value: as text, 10 would come first.
    assert list(data.class_names) == ["9", "10"]
    # 2 of 10 of each class are held out; no unlabelled one can be.
    assert sorted(data.test_labels.tolist()) == [0, 0, 1, 1]
    assert torch.bincount(data.train_labels + 1).tolist() == [10, 8, 8]
    for name, label in zip(data.train_names, data.train_labels.tolist(), strict=True):
        number = int(name.removeprefix("image ").removesuffix(".jpg"))
        assert label == (-1 if number >= 20 else (number + 1) % 2)
    held = set(map(str, data.test.files.names))
    assert held.isdisjoint(data.train_names)
    assert len(held | set(data.train_names)) == 30


def test_a_label_file_with_tabs_in_a_part_of_its_own(root, tmp_path):
    shutil.copytree(root / "val", tmp_path / "val")
    for number in range(4):
        touch(tmp_path / "train" / "deep" / f"{number}.png", number)
    (tmp_path / "train" / "labels.txt").write_text("deep/0.png\tchina\ndeep/1.png\tflower\n")
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0, 1, -1, -1]
    assert len(data.test) == 6


def test_what_is_held_out_does_not_depend_on_what_else_is_there(tmp_path):
    write_class_folders(tmp_path, 40)
    before = set(read_tree(tmp_path).test.files.names)
    assert len(before) == 8
    write_class_folders(tmp_path, 44)
    after = set(read_tree(tmp_path).test.files.names)
    assert len(after - before) + len(before - after) <= 4


def test_names_that_are_no_text_are_kept(tmp_path):
    write_tree(tmp_path)
    name = os.fsencode(tmp_path / "train" / "china") + b"/\xff\xfe.jpg"
    Path(os.fsdecode(name)).write_bytes(encoded(piece(0)))
    data = load(tmp_path)
    (sample,) = [place for place, name in enumerate(data.train_names) if name.startswith("china/\udcff")]
    assert len(list(data.train.batches(order([sample]), None, 0))) == 1


def test_what_is_ignored_is_counted_by_its_kind(tmp_path):
    write_class_folders(tmp_path / "train", 6)
    for name in ("a.HEIC", "china/b.heic", "china/c.gif", "notes", ".hidden.jpg"):
        (tmp_path / "train" / name).write_bytes(b"")
    assert read_tree(tmp_path, 0).ignored == {".heic": 2, ".gif": 1, "without an ending": 1, "hidden": 1}
    data = load_folder(tmp_path, CPU, PhotographOptions(32, 40), 0)
    assert (len(data.train), data.ignored[".heic"], list(data.warnings)) == (6, 2, [])


def test_a_folder_of_unlabelled_images_is_none_of_a_class(tmp_path):
    write_class_folders(tmp_path, 6)
    touch(tmp_path / "Unlabeled/x.jpg")
    touch(tmp_path / "Unlabeled/y.jpg")
    tree = read_tree(tmp_path, 0)
    assert tree.class_names == ["china", "flower"]
    assert tree.train.labels.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1]
    assert [f"{tmp_path}/Unlabeled is taken for unlabelled images" in told for told in tree.warnings] == [True]


def test_folders_that_are_not_looked_at_and_names_that_are_nearly_one_are_told(tmp_path):
    write_tree(tmp_path, 4, 2)
    for name in ("unlabelled/x.jpg", "test/y.jpg", "train/flowers/z.jpg", "train/flowers/q.jpg"):
        touch(tmp_path / name)
    warnings = read_tree(tmp_path).warnings
    for told, start in zip(
        warnings,
        (
            f"{tmp_path}/test is not looked at: the test images are those of val/",
            f"{tmp_path}/unlabelled is not looked at: move it into train/",
            "classes 'flower' (3) and 'flowers' (2) have nearly one name",
        ),
        strict=True,
    ):
        assert told.startswith(start)


BROKEN = {
    "no such folder": (
        lambda root: None,
        r"no such folder; name that of the images, in training by --data-dir; accepted:",
    ),
    "empty": (lambda root: root.mkdir(), r"has no images; accepted:\n.*CLASS.*labels\.txt"),
    "no image that is read": (
        lambda root: [(root / "a").mkdir(parents=True), (root / "a/1.heic").touch()],
        r"has no images, but 1 \.heic; accepted:",
    ),
    "no test part": (
        lambda root: write_class_folders(root / "train", 4),
        r"neither val nor test/; add one of them, or --test-fraction 0",
    ),
    "one class": (lambda root: [touch(root / f"a/{n}.jpg") for n in range(4)], r"of 1 classes, at least 2"),
    "images beside class folders": (
        lambda root: [write_class_folders(root, 4), touch(root / "stray.jpg")],
        r"outside class folders, the first 'stray\.jpg', and no labels\.txt",
    ),
    "unknown class in the test part": (
        lambda root: [write_tree(root), touch(root / "val/boat/0.jpg")],
        r"1 classes that no image of train/ has: boat",
    ),
    "flat validation images": (
        lambda root: [write_class_folders(root / "train", 4), touch(root / "val/ILSVRC2012_val_00000001.jpg")],
        r"outside class folders, the first 'ILSVRC2012",
    ),
    "unlabelled test image": (
        lambda root: [
            write_class_folders(root / "train", 4),
            touch(root / "val/a.jpg"),
            touch(root / "val/b.jpg"),
            (root / "val/labels.txt").write_text("a.jpg china\n"),
        ],
        r"no line for 1 images, the first 'b\.jpg'; test images need classes",
    ),
    "nothing to hold out": (
        lambda root: [touch(root / "a/0.jpg"), touch(root / "b/0.jpg")],
        r"no class has two labelled images.*--test-fraction 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_will_not_do(tmp_path, case):
    make, message = BROKEN[case]
    make(tmp_path / "data")
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(tmp_path / "data")


def test_imagenet_says_what_to_put_where(tmp_path, root):
    with pytest.raises(DataError, match=r"(?s)no ImageNet in .*train/n01440764/.*val/n01440764/.*torchvision.*pack"):
        load_imagenet(tmp_path, CPU)
    assert len(load_imagenet(root, CPU).train) == 12


@pytest.mark.parametrize(("fraction", "held"), [(0, 0), (0.01, 2), (0.2, 8), (0.5, 20)])
def test_the_share_of_labelled_images_that_is_held_out(tmp_path, fraction, held):
    """At least one of each class; with 0 none, and a folder without a part for tests will do."""
    write_class_folders(tmp_path, 40)
    tree = read_tree(tmp_path, fraction)
    assert (tree.held_out, len(tree.test.files), len(tree.train.files)) == (held, held, 40 - held)
    assert tree.test.labels.dtype == torch.int64
    assert load_folder(tmp_path, CPU, PhotographOptions(32, 40), fraction).held_out == held


def test_without_test_images(tmp_path):
    write_class_folders(tmp_path / "train", 6)
    data = load_folder(tmp_path, CPU, PhotographOptions(32, 40), 0)
    assert (len(data.train), len(data.test), len(data.test_labels), data.held_out) == (6, 0, 0, 0)
    assert list(data.test.batches([], None, 0)) == []
    touch(tmp_path / "alone/a/0.jpg")
    touch(tmp_path / "alone/b/0.jpg")
    assert len(read_tree(tmp_path / "alone", 0).train.files) == 2


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_a_share_out_of_range(root, fraction):
    with pytest.raises(
        DataError, match=r"--test-fraction is .*; accepted: at least 0, for no test images, and below 1"
    ):
        read_tree(root, fraction)


# --- batches


def test_evaluation_batches_are_torchvision_s(root):
    transform = v2.Compose(
        [v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    data = load(root)
    first, second = data.test.batches(order([5, 0, 3], [1]), None, 0)
    assert first.shape == (3, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last)
    names = sorted((root / "val").glob("*/*"))
    for image, sample in zip([*first, *second], [5, 0, 3, 1], strict=True):
        expected = transform(torch.from_numpy(pixels(names[sample].read_bytes())).permute(2, 0, 1))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_training_batches_are_crops_by_their_draw_numbers(root):
    data = load(root)
    (batch,) = data.train.batches(order(list(range(12))), FLIP, seed=5)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    paths = sorted((root / "train").glob("*/*"))
    rows = uniform(5, torch.arange(12) + 1000, RANDOM_NUMBERS).tolist()
    assert {row[-1] < 0.5 for row in rows} == {True, False}
    for image, path, row in zip(batch, paths, rows, strict=True):
        full = torch.from_numpy(pixels(path.read_bytes())).permute(2, 0, 1)
        crop = v2.functional.resized_crop(full, *random_rectangle(*full.shape[1:], row), [32, 32], antialias=True)
        expected = normalise(crop.flip(-1) if row[-1] < 0.5 else crop)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_pixels_and_order_depend_neither_on_workers_nor_on_batches(root):
    alone = torch.cat(list(load(root).train.batches(order([3, 7, 1, 11], [0, 2]), FLIP, 1)))
    for workers in (1, 2):
        shared = torch.cat(list(load(root, workers=workers).train.batches(order([3], [7, 1], [11, 0], [2]), FLIP, 1)))
        assert torch.equal(shared, alone)


def test_another_seed_or_draw_is_another_crop(root):
    images = load(root).train
    (first,) = images.batches(order([3]), FLIP, 1)
    (other_seed,) = images.batches(order([3]), FLIP, 2)
    (other_draw,) = images.batches([keyed([3], [7])], FLIP, 1)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_draw)


def test_two_passes_at_once_do_not_mix(root):
    images = load(root, workers=1).train
    pairs = list(zip(images.batches(order([0], [1]), None, 0), images.batches(order([2], [3]), None, 0), strict=True))
    expected = list(load(root).train.batches(order([0], [2], [1], [3]), None, 0))
    assert all(torch.equal(a, b) for a, b in zip([x for pair in pairs for x in pair], expected, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_image": "ignore"}, r"on_bad_image is 'ignore'; accepted: error, skip"),
        ({"decoder": "gpu"}, r"decoder is 'gpu'; accepted: cpu, dali"),
        ({"image_size": 64}, r"image_size is 64 and resize 40; accepted"),
        ({"image_size": 0}, r"image_size is 0"),
        ({"workers": -1}, r"workers is -1; accepted: 0 or more"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PhotographOptions(**{"image_size": 32, "resize": 40} | options)


@pytest.mark.parametrize("augmentation", [Augmentation(translate=2), Augmentation(cutout=8)])
def test_augmentations_of_small_images_are_refused_at_once(root, augmentation):
    with pytest.raises(ValueError, match=r"translate is \d and cutout \d; accepted for photographs: 0"):
        load(root).train.batches(order([0]), augmentation, 0)


# --- bad images


@pytest.fixture
def damaged(root, tmp_path):
    """A tree whose training samples 1 and 8 are damaged: cut off, and no image."""
    copy = shutil.copytree(root, tmp_path / "damaged")
    path = copy / "train/china/002.jpg"
    path.write_bytes(path.read_bytes()[:900])
    (copy / "train/flower/005.jpg").write_text("not an image")
    return copy


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_an_error_that_names_it(damaged, workers):
    with pytest.raises(BadImageError, match=r"^china/002\.jpg: damaged JPEG file .*--on-bad-image skip"):
        list(load(damaged, workers=workers).train.batches(order([0, 1, 2]), FLIP, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_the_mean_colour_and_counted_once(damaged, root, workers):
    images = load(damaged, workers=workers, on_bad_image="skip").train
    assert images.bad_images == {}
    for augmentation in (FLIP, None):
        (batch,) = images.batches(order([0, 1, 8, 3]), augmentation, 0)
        (whole,) = load(root).train.batches(order([0, 1, 8, 3]), augmentation, 0)
        assert batch[1:3].abs().max() < 0.01
        assert torch.equal(batch[[0, 3]], whole[[0, 3]])
    assert images.bad_images.keys() == {"china/002.jpg", "flower/005.jpg"}
    assert "Premature end" in images.bad_images["china/002.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_is_a_bad_image_and_one_of_a_folder_that_is_gone_an_error(root, tmp_path, workers):
    copy = shutil.copytree(root, tmp_path / "copy")
    strict, lenient = (load(copy, on_bad_image=setting, workers=workers).train for setting in ("error", "skip"))
    (copy / "train/china/000.jpg").unlink()
    (copy / "train/china/002.jpg").unlink()
    (copy / "train/china/002.jpg").symlink_to("elsewhere.jpg")
    for sample, reason in (
        (0, r"china/000\.jpg: the file is not there any more"),
        (1, r"a link to .*/elsewhere\.jpg, which"),
    ):
        with pytest.raises(BadImageError, match=reason):
            list(strict.batches(order([sample]), None, 0))
    (batch,) = lenient.batches(order([0, 1]), None, 0)
    assert lenient.bad_images.keys() == {"china/000.jpg", "china/002.jpg"}
    assert batch.abs().max() < 0.01
    # A file server that is away must not turn a data set into grey squares.
    shutil.rmtree(copy / "train/china")
    for images in (strict, lenient):
        with pytest.raises(DataError, match=r"cannot read .*china/000\.jpg: No such file.*--resume goes on"):
            list(images.batches(order([0]), None, 0))


def test_a_file_that_can_be_opened_and_not_read_is_named(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    images = load(copy, on_bad_image="skip").train
    (copy / "train/china/000.jpg").unlink()
    (copy / "train/china/000.jpg").symlink_to("/proc/self/mem")  # at whose beginning there is nothing
    with pytest.raises(
        DataError, match=r"cannot read .*000\.jpg, a link to /proc/.*: Input/output error\. When it can be"
    ):
        list(images.batches(order([0]), None, 0))


def test_every_kind_of_image_makes_a_batch(tmp_path):
    kinds = {
        "grey.jpg": encoded(piece(0).convert("L")),
        "cmyk.jpg": encoded(piece(0).convert("CMYK")),
        "palette.png": encoded(piece(0).convert("P"), "PNG"),
        "alpha.png": encoded(piece(0).convert("RGBA"), "PNG"),
        "row.jpg": encoded(piece(0).resize((300, 1))),
        "column.png": encoded(piece(0).resize((1, 300)), "PNG"),
        "pixel.jpg": encoded(piece(0).resize((1, 1))),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    files = FolderFiles(tmp_path, Names.of(sorted(kinds)))
    images = PhotographImages(files, CPU, PhotographOptions(32, 40))
    for augmentation in (FLIP, None):
        (batch,) = images.batches(order(list(range(len(kinds)))), augmentation, 0)
        assert batch.shape == (len(kinds), 3, 32, 32)
        assert batch.isfinite().all()


def test_loading_can_be_sent_to_a_process_that_is_not_forked(root):
    load_batch = load(root).train.loading(FLIP, 1)
    (batch,) = order([3, 7])
    assert torch.equal(pickle.loads(pickle.dumps(load_batch))(batch)[0], load_batch(batch)[0])


def test_names_are_a_sequence_and_small():
    strings = [f"n{number:08}/n{number:08}_{number}.JPEG" for number in range(500)] + ["", "名前/ü.png"]
    names = Names.of(strings)
    assert list(names) == strings
    assert (len(names), names[-1], names[3], names[1:7:2]) == (502, strings[-1], strings[3], strings[1:7:2])
    with pytest.raises(IndexError):
        names[502]
    assert names.text.nbytes + names.ends.nbytes < 502 * 40
    assert np.array_equal(names.ends[:2], [len(strings[0]), len(strings[0]) * 2])
