import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bench.memory import process_memory
from r2d2fast.data import Augmentation, Batch, DataError, Embeddings, consecutive_batches, load_embeddings
from r2d2fast.data import embeddings as module
from r2d2fast.data.file_rows import FileRows

CPU = torch.device("cpu")


def matrix(rows=40, features=7, dtype=np.float32):
    generator = np.random.default_rng(0)
    scale = 10.0 ** np.arange(features) / 100
    return (generator.normal(3, 1, (rows, features)) * scale).astype(dtype)


def everything(part):
    return torch.cat(list(part.batches(consecutive_batches(torch.arange(len(part)), 16), None, 0)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["array", "tensor", "columns of another order", "a stretch of columns", "other bytes"])
def test_batches_are_the_rows_asked_for_as_float32(dtype, kind):
    x = matrix(features=4, dtype=dtype)
    given = {
        "array": x,
        "tensor": torch.from_numpy(x),
        "columns of another order": np.asfortranarray(x),
        "a stretch of columns": np.concatenate([x, x], axis=1)[:, 2:6],
        "other bytes": x.astype(x.dtype.newbyteorder()),
    }[kind]
    expected = x.copy() if kind != "a stretch of columns" else np.concatenate([x, x], axis=1)[:, 2:6]
    part = Embeddings(given, CPU)
    np.testing.assert_array_equal(given, expected)  # nobody else's numbers are changed
    assert (part.shape, len(part), part.bad_images) == ((4,), 40, {})
    samples = torch.tensor([3, 0, 39, 3])
    first, second = part.batches([Batch(samples, None, 4), Batch(samples[:1], None, 1)], None, 0)
    assert first.dtype == second.dtype == torch.float32
    np.testing.assert_array_equal(first.numpy(), expected[samples.numpy()].astype(np.float32))
    np.testing.assert_array_equal(second.numpy(), expected[[3]].astype(np.float32))
    assert torch.equal(part.on_device(Augmentation(), 0)(samples, torch.arange(4)), first)


def test_rows_are_not_copied():
    x = matrix()
    part = Embeddings(x, CPU)
    x[0] = -1
    assert (everything(part)[0] == -1).all()


@pytest.mark.parametrize("rows_of_a_piece", [1, 7, 1000])
def test_mean_and_deviation_of_each_feature_are_those_in_float64(monkeypatch, rows_of_a_piece):
    monkeypatch.setattr(module, "_PIECE", 8 * 7 * rows_of_a_piece)
    x = matrix()
    part = Embeddings(x, CPU)
    np.testing.assert_allclose(part.mean, x.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(part.std, x.astype(np.float64).std(0), rtol=1e-6)


def test_a_feature_with_one_value_has_deviation_1():
    x = matrix()
    x[:, 2], x[:, 3] = 0.1, 0
    x[:, 4] = 1e-20 * x[:, 0]
    part = Embeddings(x, CPU)
    assert part.std[2:4].tolist() == [1, 1]
    assert part.std[4] == pytest.approx(1e-20 * float(part.std[0]))


def test_no_rows_have_no_batches():
    part = Embeddings(torch.empty(0, 7), CPU)
    assert (len(part), part.shape, part.mean.tolist(), part.std.tolist()) == (0, (7,), [0] * 7, [1] * 7)
    assert list(part.batches([], None, 0)) == []


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [(np.nan, np.float16, "NaN"), (-np.inf, np.float32, "inf"), (1e39, np.float64, "too large for float32")],
)
def test_a_number_that_is_not_finite_is_named(monkeypatch, value, dtype, said):
    monkeypatch.setattr(module, "_PIECE", 8 * 7 * 8)
    x = matrix(dtype=np.float64) / 1e4
    x[29, 5] = value
    with pytest.raises(DataError, match=rf"X has .*{said}.* in row 29, column 5"):
        Embeddings(x.astype(dtype), CPU)


def test_the_largest_numbers_of_float32_have_a_deviation():
    part = Embeddings(np.array([[1.0, -3e38], [2.0, 3e38]], np.float32), CPU)
    assert part.std.tolist() == pytest.approx([0.5, 3e38])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.zeros(5), r"X is torch.float64 \[5\]; accepted: float16, float32, float64 \[M, D\]"),
        (np.zeros((5, 2), np.int64), "X is int64; accepted: float16"),
        (torch.zeros(5, 2, dtype=torch.bfloat16), "X is torch.bfloat16"),
        (np.zeros((5, 0)), r"\[5, 0\]"),
    ],
)
def test_other_shapes_and_types_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        Embeddings(rows, CPU)


@pytest.mark.parametrize("augmentation", [Augmentation(translate=1), Augmentation(flip=True), Augmentation(cutout=2)])
def test_augmentations_of_images_are_refused(augmentation):
    part = Embeddings(matrix(), CPU)
    with pytest.raises(ValueError, match="accepted for embeddings: no shifts, no flip, no cutout"):
        part.batches([], augmentation, 0)
    assert list(part.batches([], Augmentation(), 0)) == []


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", matrix())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("part", [np.s_[:], np.s_[2:], np.s_[1:-1:3], np.s_[:, 2:]], ids=str)
def test_rows_of_a_mapped_file_are_read_from_it(mapped, part):
    rows = Embeddings(np.asarray(mapped)[part], CPU)
    assert isinstance(rows._file, FileRows) == (mapped[part].strides[1] == 4)
    np.testing.assert_array_equal(everything(rows).numpy(), matrix()[part])
    picked = torch.tensor([3, 0, 3])
    (batch,) = rows.batches([Batch(picked, None, 3)], None, 0)
    np.testing.assert_array_equal(batch.numpy(), matrix()[part][[3, 0, 3]])


def test_no_batch_of_a_mapped_file_is_made_on_the_device_alone(mapped):
    assert Embeddings(mapped, CPU).on_device(Augmentation(), 0) is None


def test_pages_of_a_mapped_file_do_not_stay_in_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2000, 4096), np.float32))  # 33 MB
    before = process_memory("RssFile")
    part = Embeddings(np.load(tmp_path / "x.npy", mmap_mode="r"), CPU)
    everything(part)
    assert process_memory("RssFile") - before < 10e6


def test_a_private_copy_is_no_file_s_rows(tmp_path):
    np.save(tmp_path / "x.npy", matrix())
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[1] = 7  # neither the first row nor the last, by which a file is known again
    part = Embeddings(np.asarray(private), CPU)
    assert part._file is None
    np.testing.assert_array_equal(everything(part)[1].numpy(), private[1])
    assert Embeddings(matrix(), CPU)._file is None


def test_a_file_that_is_another_one_by_now_is_not_read(mapped, tmp_path):
    (tmp_path / "x.npy").unlink()
    assert Embeddings(mapped, CPU)._file is None
    np.save(tmp_path / "x.npy", matrix() + 1)
    part = Embeddings(mapped, CPU)
    assert part._file is None
    np.testing.assert_array_equal(everything(part).numpy(), matrix())


def test_a_file_that_has_become_shorter_is_named(mapped, tmp_path):
    part = Embeddings(mapped, CPU)
    os.truncate(tmp_path / "x.npy", (tmp_path / "x.npy").stat().st_size - 1)
    with pytest.raises(DataError, match=r"x\.npy ends before row 39; it has changed since it was opened: start again"):
        everything(part)


# --- a folder


@pytest.fixture
def folder(tmp_path):
    x = matrix(48)
    labels = np.arange(48) % 3
    labels[12:40] = -1
    np.save(tmp_path / "train.npy", x[:40].astype(np.float16))
    np.save(tmp_path / "train_labels.npy", labels[:40])
    np.save(tmp_path / "test.npy", x[40:])
    np.save(tmp_path / "test_labels.npy", labels[40:])
    (tmp_path / "classes.txt").write_text("cat\ndog\nIrish setter\n")
    (tmp_path / "train_names.txt").write_text("".join(f"é{number}.jpg\n" for number in range(40)))
    return tmp_path


def test_a_folder_is_a_data_set(folder):
    data = load_embeddings(folder, CPU)
    assert (len(data.train), len(data.test), data.train.shape) == (40, 8, (7,))
    assert (data.num_classes, list(data.class_names)) == (3, ["cat", "dog", "Irish setter"])
    assert data.train_labels.tolist() == [*(number % 3 for number in range(12)), *[-1] * 28]
    assert data.test_labels.tolist() == [number % 3 for number in range(40, 48)]
    assert (data.train_names[0], data.train_names[39]) == ("é0.jpg", "é39.jpg")
    np.testing.assert_array_equal(everything(data.test).numpy(), matrix(48)[40:])
    assert data.train._file is None  # small: read


def test_without_what_is_optional(folder):
    for name in ("test.npy", "test_labels.npy", "classes.txt", "train_names.txt"):
        (folder / name).unlink()
    data = load_embeddings(folder, CPU)
    assert (len(data.test), len(data.test_labels), data.test.shape) == (0, 0, (7,))
    assert list(data.class_names) == ["0", "1", "2"]
    assert (len(data.train_names), data.train_names[39], data.train_names[:2]) == (40, "39", ["0", "1"])
    with pytest.raises(IndexError):
        data.train_names[40]


@pytest.mark.parametrize("mapped", [True, False])
def test_safetensors(folder, monkeypatch, mapped):
    if mapped:
        monkeypatch.setattr(module, "_free_memory", lambda: 100)
    (folder / "train.npy").unlink()
    save_file({"embeddings": matrix(48)[:40]}, folder / "train.safetensors", {"made by": "me"})
    data = load_embeddings(folder, CPU)
    np.testing.assert_array_equal(everything(data.train).numpy(), matrix(48)[:40])
    assert (data.train._file is not None) == mapped


def test_a_large_file_is_mapped(folder, monkeypatch):
    monkeypatch.setattr(module, "_free_memory", lambda: 4 * (40 * 7 * 2) - 1)
    data = load_embeddings(folder, CPU)
    assert data.train._file is not None
    np.testing.assert_array_equal(everything(data.train).numpy(), matrix(48, dtype=np.float16)[:40])


def test_free_memory_is_some():
    assert 2**20 < module._free_memory() < 2**50


def labels_with(folder, row, value, name="train_labels.npy"):
    labels = np.load(folder / name)
    labels[row] = value
    np.save(folder / name, labels)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def saved(name, array):
    return lambda folder: np.save(folder / name, array)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("train.npy"), "missing in .*: train.npy. A folder of embeddings has"),
        (without("train_labels.npy"), "missing in .*: train_labels.npy. A folder"),
        (without("test.npy"), "has test_labels.npy but no test.npy; add it, or remove test_labels.npy"),
        (without("test_labels.npy"), "has test.npy but no test_labels.npy"),
        (saved("test.npy", matrix(8, 6)), "the rows of .*test have 6 numbers, those of .*train 7"),
        (saved("train_labels.npy", np.zeros(39, np.int64)), r"int64 \[39\]; needed is int64 \[40\]"),
        (saved("train_labels.npy", np.zeros(40)), r"float64 \[40\]; needed is int64 \[40\]"),
        (saved("train_labels.npy", np.full(40, -1)), "labels no sample: all are -1"),
        (saved("train.npy", np.zeros((40, 7, 2))), r"train is torch.float64 \[40, 7, 2\]"),
        (lambda folder: labels_with(folder, 5, -2), "the label of row 5 is -2; accepted: .* and -1 for an unlabelled"),
        (lambda folder: labels_with(folder, 5, 3), "the label of row 5 is 3, and there are 3 classes"),
        (lambda folder: labels_with(folder, 5, -1, "test_labels.npy"), "the label of row 5 is -1; accepted: .* from 0$"),
        (lambda folder: labels_with(folder, 5, 9, "test_labels.npy"), "the label of row 5 is 9"),
        (written("classes.txt", b"cat\ndog\nsetter\nfox\n"), r"class 3 \(fox\) has no labelled sample"),
        (written("classes.txt", b"cat\ncat\ndog\n"), "has an empty line, or a name twice"),
        (written("train_names.txt", b"a\nb\n"), "has 2 lines for 40 rows"),
        (
            written("train_names.txt", b"a\n" + b"".join(b"%d\n" % number for number in range(38)) + b"7\n"),
            "train_names.txt, line 40: '7' is in line 9 already; give each row its own name",
        ),
        (written("train.npy", b"no array"), "train.npy cannot be read as a .npy file"),
        (written("train_labels.npy", b""), "train_labels.npy cannot be read as a .npy file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_a_way_out(folder, damage, said):
    damage(folder)
    with pytest.raises(DataError, match=said):
        load_embeddings(folder, CPU)


def test_one_class_is_not_enough(folder):
    (folder / "classes.txt").unlink()
    np.save(folder / "train_labels.npy", np.zeros(40, np.int64))
    with pytest.raises(DataError, match="one class only"):
        load_embeddings(folder, CPU)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a .safetensors file"),
        (b"\xff" * 30, "cannot be read as a .safetensors file"),
        (b"\x02" + bytes(7) + b"{}", "holds nothing; accepted: one tensor"),
    ],
)
def test_damaged_safetensors(folder, content, said):
    (folder / "train.npy").unlink()
    (folder / "train.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_embeddings(folder, CPU)


def test_an_archive_and_two_tensors_are_refused(folder):
    np.savez(folder / "archive.npz", matrix())
    (folder / "archive.npz").rename(folder / "train.npy")
    with pytest.raises(DataError, match="is an archive of arrays"):
        load_embeddings(folder, CPU)
    (folder / "train.npy").unlink()
    save_file({"a": matrix(), "b": np.zeros((2, 2), np.int32)}, folder / "train.safetensors")
    with pytest.raises(DataError, match=r"holds .*F32 \[40, 7\].*; accepted: one tensor"):
        load_embeddings(folder, CPU)
