"""What a finished run says of images: the same as its own evaluation, to the last image."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

import r2d2fast
from r2d2fast.data import DataError, load_dataset, load_folder
from r2d2fast.models import export_safetensors
from r2d2fast.predict import cli
from r2d2fast.predict.trained_run import RunError
from r2d2fast.train import cli as train_cli
from r2d2fast.train.run_directory import read_config
from tests.data.small_photographs import encoded, piece, write_tree

CPU = torch.device("cpu")
SHORT = ("--stages=1", "--stage1.epochs=2", "--threads=1", "--device=cpu")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The directory of a short run on the digits."""
    directory = tmp_path_factory.mktemp("digits") / "run"
    assert train_cli.main([*SHORT, f"--run-dir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of photographs, some of them upright, in train/ and val/."""
    return write_tree(tmp_path_factory.mktemp("photographs"), train=12, val=10)


@pytest.fixture(scope="module")
def photograph_run(photographs, tmp_path_factory):
    """The directory of a short run on them, at sizes that no recipe has."""
    directory = tmp_path_factory.mktemp("photographs-run") / "run"
    flags = ("--dataset=folder", f"--data-dir={photographs}", "--backbone=small", "--image-size=24", "--resize=30")
    assert train_cli.main([*SHORT, *flags, "--stage1.batch=4", f"--run-dir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """The digits' pixels as embeddings, of which the first fifty are labelled, and the run that has learned from them."""
    pixels, classes = load_digits(return_X_y=True)
    folder = tmp_path_factory.mktemp("embeddings")
    np.save(folder / "train.npy", pixels[:1000].astype(np.float16))
    np.save(folder / "train_labels.npy", np.where(np.arange(1000) < 50, classes[:1000], -1))
    np.save(folder / "test.npy", pixels[1000:])
    np.save(folder / "test_labels.npy", classes[1000:])
    (folder / "classes.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    (folder / "train_names.txt").write_text("\n".join(f"scan {number}, page 1" for number in range(1000)))
    run = folder / "run"
    sizes = ["--stage1.epochs=20", "--stage2.epochs=4", "--stage2.repredict-epochs=1,2,3"]
    assert train_cli.main(["--dataset=embeddings", f"--data-dir={folder}", f"--run-dir={run}", *sizes]) == 0
    return folder, run


@pytest.fixture(scope="module")
def digits_pixels():
    """The test images, uint8 [360, 8, 8], and their classes."""
    data = load_dataset("digits", None, CPU, False)
    return data.test._rows.view(-1, 8, 8).numpy(), data.test_labels.numpy()


def recorded_error(directory):
    return json.loads((directory / "results.json").read_text())["test_error"]


def read_csv(text):
    header, *rows = csv.reader(io.StringIO(text))
    return header, rows


# --- the same as the run


def test_the_test_error_of_the_digits_is_the_runs_own(digits_run, digits_pixels):
    pixels, classes = digits_pixels
    predictions = r2d2fast.load_run(digits_run, "cpu").predict(pixels)
    assert 100 * (predictions.classes != classes).sum() / 360 == pytest.approx(recorded_error(digits_run), abs=1e-12)
    assert predictions.names == [str(number) for number in predictions.classes]
    assert predictions.probabilities.shape == (360, 10)
    assert predictions.probabilities.dtype == np.float32
    assert (predictions.probabilities.argmax(1) == predictions.classes).all()
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-5)


def test_the_test_error_of_photographs_is_the_runs_own(photograph_run, photographs):
    run = r2d2fast.load_run(photograph_run, "cpu")
    assert run.class_names == ["china", "flower"]
    data = load_folder(photographs, CPU)
    files = [photographs / "val" / name for name in data.test.files.names]
    predictions = run.predict(files)
    wrong = (predictions.classes != data.test_labels.numpy()).sum()
    assert 100 * wrong / len(files) == pytest.approx(recorded_error(photograph_run), abs=1e-12)


@pytest.mark.parametrize("form", ["path", "folder", "arrays", "tensors", "one tensor", "workers"])
def test_all_kinds_of_input_give_the_same(form, photograph_run, photographs):
    run = r2d2fast.load_run(photograph_run, "cpu")
    folder = photographs / "val" / "china"
    files = sorted(folder.iterdir())
    pixels = [np.array(Image.open(file)) for file in files]
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]
    expected = run.predict(files).probabilities
    if form == "path":
        assert np.array_equal(run.predict(str(files[1])).probabilities, run.predict([files[1]]).probabilities)
    elif form == "one tensor":
        same_size = [image for image in tensors if image.shape == tensors[0].shape]
        batch = run.predict(torch.stack(same_size)).probabilities
        assert np.array_equal(batch, run.predict(same_size).probabilities)
    else:
        inputs = {"folder": folder, "arrays": pixels, "tensors": tensors, "workers": files}[form]
        assert np.array_equal(run.predict(inputs, workers=2 * (form == "workers")).probabilities, expected)


def test_labels_csv_says_what_predict_says(digits_run, photograph_run, photographs):
    header, rows = read_csv((digits_run / "labels.csv").read_text())
    assert header == ["name", "class", "probability", "origin"]
    assert [row[0] for row in rows] == [str(number) for number in range(1437)]
    data = load_dataset("digits", None, CPU, False)
    predictions = r2d2fast.load_run(digits_run, "cpu").predict(data.train._rows.view(-1, 8, 8).numpy())
    given = [row[3] == "given" for row in rows]
    assert sum(given) == 50
    for row, known, label, name, probabilities in zip(
        rows, given, data.train_labels.tolist(), predictions.names, predictions.probabilities, strict=True
    ):
        if known:
            assert row[1:] == [str(label), "1", "given"]
        else:
            assert (row[1], row[3]) == (name, "pseudo-label")
            assert float(row[2]) == pytest.approx(probabilities.max(), rel=1e-4)
    _, rows = read_csv((photograph_run / "labels.csv").read_text())
    assert {(row[0], row[1], row[2], row[3]) for row in rows} == {
        (file.relative_to(photographs / "train").as_posix(), file.parent.name, "1", "given")
        for file in (photographs / "train").rglob("*.jpg")
    }


# --- the command line


def test_the_command_line_prints_a_row_for_each_image_and_the_error(photograph_run, photographs, capsys):
    assert cli.main([str(photograph_run), str(photographs / "val"), "--device=cpu"]) == 0
    said = capsys.readouterr()
    header, rows = read_csv(said.out)
    assert header == ["name", "class", "probability"]
    files = sorted(map(str, (photographs / "val").rglob("*.jpg")))
    assert [row[0] for row in rows] == files
    predictions = r2d2fast.load_run(photograph_run, "cpu").predict(files)
    assert [row[1] for row in rows] == predictions.names
    assert [float(row[2]) for row in rows] == pytest.approx(predictions.probabilities.max(1), rel=1e-5)
    assert f"error {recorded_error(photograph_run):.2f} %: " in said.err
    assert "of the 10 images whose class is known" in said.err


def test_bad_images_are_named_and_counted(photograph_run, photographs, tmp_path, capsys):
    good = shutil.copy(photographs / "val" / "china" / "000.jpg", tmp_path / "good.jpg")
    (tmp_path / "bad, so “bad”.jpg").write_bytes(b"no image")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    out = tmp_path / "out.csv"
    assert cli.main([str(photograph_run), str(tmp_path), f"--out={out}"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    _, rows = read_csv(out.read_text())
    assert [row[0] for row in rows] == sorted(
        str(tmp_path / name) for name in ("bad, so “bad”.jpg", "gone.jpg", "good.jpg")
    )
    assert [row[1:] for row in rows if row[0] != str(good)] == [["", ""], ["", ""]]
    assert f"{tmp_path / 'gone.jpg'}: No such file or directory" in said.err
    assert f"{tmp_path / 'bad, so “bad”.jpg'}: not a readable image" in said.err
    assert "2 images of 3 could not be used and got no class" in said.err
    assert f"3 rows in {out}" in said.err
    assert "error" not in said.err
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(DataError, match=r"gone\.jpg"):
        r2d2fast.load_run(photograph_run).predict([good, tmp_path / "gone.jpg"])
    predictions = r2d2fast.load_run(photograph_run).predict([tmp_path / "gone.jpg", good], on_bad_image="skip")
    assert predictions.classes[0] == -1
    assert predictions.names[0] == ""
    assert np.isnan(predictions.probabilities[0]).all()
    assert predictions.names[1] in ("china", "flower")
    assert list(predictions.bad_images) == [str(tmp_path / "gone.jpg")]


def test_classes_from_a_file_of_labels(photograph_run, photographs, tmp_path, capsys):
    for number in range(3):
        shutil.copy(photographs / "val" / "china" / f"00{2 * number}.jpg", tmp_path / f"{number}.jpg")
    names = r2d2fast.load_run(photograph_run).predict(tmp_path).names
    other = {"china": "flower", "flower": "china"}
    # One right, one wrong, one of a class that the run does not know.
    (tmp_path / "labels.txt").write_text(f"0.jpg {names[0]}\n1.jpg {other[names[1]]}\n2.jpg unheard-of\n")
    assert cli.main([str(photograph_run), str(tmp_path)]) == 0
    assert "error 50.00 %: 1 of the 2 images whose class is known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["nowhere"], "nowhere: no such file or folder; name image files"),
        (["empty"], "empty has no images; their names end in .jpg"),
        ([], "no SOURCE; name image files"),
    ],
)
def test_sources_that_are_none(sources, said, photograph_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main([str(photograph_run), *sources, "--out=out.csv"]) == 1
    assert f"python -m r2d2fast.predict: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_file_that_cannot_be_written_is_named(photograph_run, photographs, tmp_path, capsys):
    assert cli.main([str(photograph_run), str(photographs / "val"), f"--out={tmp_path / 'none' / 'out.csv'}"]) == 1
    assert f"cannot write {tmp_path / 'none' / 'out.csv'}: No such file or directory" in capsys.readouterr().err


def test_the_commands_that_the_run_prints_work(digits_run, digits_pixels, tmp_path, capsys):
    pixels, _ = digits_pixels
    Image.fromarray(pixels[0]).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(pixels[0][:, :, None], 3, axis=2)).save(tmp_path / "as-rgb.png")
    assert cli.main([str(digits_run / "network.safetensors"), str(tmp_path)]) == 0
    _, rows = read_csv(capsys.readouterr().out)
    expected = r2d2fast.load_run(digits_run).predict(pixels[:1]).names[0]
    assert [row[1] for row in rows] == [expected, expected]


# --- what is not accepted


def test_small_images_of_another_size_or_in_colour_are_bad_images(digits_run):
    run = r2d2fast.load_run(digits_run)
    with pytest.raises(DataError, match="9 x 8 pixels, and this network has learned from images of 8 x 8 only"):
        run.predict(np.zeros((1, 8, 9), np.uint8))
    coloured = np.zeros((2, 8, 8, 3), np.uint8)
    coloured[1, 2, 3, 1] = 1
    with pytest.raises(DataError, match="1: coloured, and this network has learned from grey images only"):
        run.predict(coloured)
    assert run.predict(coloured, on_bad_image="skip").classes[1] == -1


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        (np.zeros((2, 8, 8)), ValueError, r"an image is float64 \[8, 8\]; accepted: "),
        (np.zeros((8, 8), np.uint8), ValueError, r"the array is uint8 \[8, 8\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError, r"an image is uint8 \[8, 8, 4\]"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), ValueError, r"the tensor is torch.uint8 \[2, 8, 8\]"),
        ([torch.zeros(1, 8, 8)], ValueError, r"an image is float32 \[8, 8, 1\]"),
        (["a.png", np.zeros((8, 8), np.uint8)], TypeError, "a sequence of ndarray, str; accepted"),
        ([1, 2], TypeError, "a sequence of int; accepted"),
    ],
)
def test_inputs_of_another_kind_are_refused(inputs, error, said, digits_run):
    with pytest.raises(error, match=said):
        r2d2fast.load_run(digits_run).predict(inputs)


def test_no_images_at_all_give_nothing(digits_run):
    predictions = r2d2fast.load_run(digits_run).predict(np.zeros((0, 8, 8), np.uint8))
    assert (predictions.classes.shape, predictions.names, predictions.probabilities.shape) == ((0,), [], (0, 10))


# --- the network's file


def test_the_callers_random_numbers_and_threads_stay_as_they_were(digits_run, digits_pixels):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    r2d2fast.load_run(digits_run).predict(digits_pixels[0])
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_run_without_a_network_is_named_with_the_way_out(tmp_path, capsys):
    with pytest.raises(RunError, match=r"network\.safetensors: no such file; name the directory of a finished run"):
        r2d2fast.load_run(tmp_path)
    assert cli.main([str(tmp_path), str(tmp_path)]) == 1
    assert "--resume --run-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["cut off", "no file of its kind", "no metadata", "another backbone", "another kind"]
)
def test_a_damaged_network_is_named(damage, digits_run, tmp_path):
    content = (digits_run / "network.safetensors").read_bytes()
    with safetensors.safe_open(digits_run / "network.safetensors", "pt") as file:
        about = file.metadata()
    network = r2d2fast.load_run(digits_run).model
    path = tmp_path / "network.safetensors"
    changed = {
        "cut off": lambda: content[:-100],
        "no file of its kind": lambda: b"nothing",
        "no metadata": lambda: export_safetensors(network, {}),
        "another backbone": lambda: export_safetensors(network, {**about, "backbone": "resnet18"}),
        "another kind": lambda: export_safetensors(
            network, {**about, "preprocessing": about["preprocessing"].replace("small images", "sounds")}
        ),
    }
    path.write_bytes(changed[damage]())
    with pytest.raises(RunError, match=r"network\.safetensors (cannot be used|does not say how to use it): "):
        r2d2fast.load_run(tmp_path)


def test_photographs_are_resized_and_normalised_as_the_file_says(photograph_run, photographs, tmp_path):
    with safetensors.safe_open(photograph_run / "network.safetensors", "pt") as file:
        about = file.metadata()
    network = r2d2fast.load_run(photograph_run).model
    before = r2d2fast.load_run(photograph_run).predict(photographs / "val").probabilities
    for old, new in (("0.485", "0.9"), ("bilinear", "bicubic")):
        changed = about | {"preprocessing": about["preprocessing"].replace(old, new)}
        (tmp_path / "network.safetensors").write_bytes(export_safetensors(network, changed))
        assert (r2d2fast.load_run(tmp_path).predict(photographs / "val").probabilities != before).any()


def test_the_metadata_say_all_that_it_takes(photograph_run):
    with safetensors.safe_open(photograph_run / "network.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["classes"]) == ["china", "flower"]
    assert (about["backbone"], about["dataset"], about["precision"]) == ("small", "folder", "float32")
    preprocessing = json.loads(about["preprocessing"])
    assert (preprocessing["shape"], preprocessing["resize"], preprocessing["divisor"]) == ([3, 24, 24], 30, 255.0)
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    arguments = json.loads(about["arguments"])
    assert (arguments["in_channels"], arguments["image_size"], arguments["num_classes"]) == (3, 24, 2)


@pytest.mark.slow
def test_import_is_light_until_a_run_is_loaded(digits_run):
    code = (
        "import sys, r2d2fast; assert not {'torchvision', 'sklearn', 'tyro'} & set(sys.modules);"
        "assert 'load_run' in r2d2fast.__all__; print(r2d2fast.load_run.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "load_run\n", result.stderr
    with pytest.raises(AttributeError, match="has no attribute 'load_runs'"):
        _ = r2d2fast.load_runs


def test_the_runs_own_settings_can_be_read_from_its_directory(photograph_run, photographs):
    config = read_config(photograph_run)
    assert (config.dataset, config.data_dir, config.image_size, config.resize) == ("folder", photographs, 24, 30)
    assert train_cli.main(["--eval-only", f"--run-dir={photograph_run}"]) == 0


def test_a_picture_of_any_mode_is_decoded_as_in_training(photograph_run, tmp_path):
    run = r2d2fast.load_run(photograph_run)
    grey = piece(1).convert("L")
    (tmp_path / "grey.png").write_bytes(encoded(grey, "PNG"))
    one, two = run.predict([np.array(grey)]), run.predict([tmp_path / "grey.png"])
    assert np.array_equal(one.probabilities, two.probabilities)


def test_embeddings_of_a_file_a_folder_and_an_array(embeddings, capsys):
    folder, run = embeddings
    assert cli.main([str(run), str(folder / "test.npy")]) == 0
    out, err = capsys.readouterr()
    assert f"error {recorded_error(run):.2f} %" in err
    _, rows = read_csv(out)
    assert [row[0] for row in rows] == [str(number) for number in range(797)]
    predictions = r2d2fast.load_run(run).predict(np.load(folder / "test.npy"))
    assert [row[1] for row in rows] == predictions.names
    assert cli.main([str(run), str(folder), "--out", str(run / "all.csv")]) == 0
    _, everything = read_csv((run / "all.csv").read_text())
    assert [row[1] for row in everything[1000:]] == predictions.names
    # What the run says of its own training samples, the labels that were given apart.
    _, own = read_csv((run / "labels.csv").read_text())
    assert [row[0] for row in own] == [row[0] for row in everything[:1000]]
    assert all(one[1] == other[1] for one, other in zip(own[50:], everything[50:], strict=False))


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        (np.zeros((2, 63), np.float32), ValueError, "have 63 numbers, and this network takes 64"),
        (["one.jpg"], TypeError, r"got list; this network takes embeddings: an array or a tensor \[B, 64\]"),
        ("nowhere.npy", DataError, "nowhere.npy: no such file"),
        (np.full((2, 64), np.nan), DataError, "X has NaN in row 0, column 0"),
    ],
)
def test_embeddings_that_do_not_fit(inputs, error, said, embeddings):
    with pytest.raises(error, match=said):
        r2d2fast.load_run(embeddings[1]).predict(inputs)


def test_a_folder_without_embeddings_is_named(embeddings, tmp_path, capsys):
    assert cli.main([str(embeddings[1]), str(tmp_path)]) == 1
    assert f"{tmp_path} has no embeddings: neither train.npy nor test.npy" in capsys.readouterr().err


def test_a_misspelt_argument_is_no_other_one(digits_run):
    with pytest.raises(ValueError, match="on_bad_image is 'raise'; accepted: error, skip"):
        r2d2fast.load_run(digits_run).predict(np.zeros((1, 8, 8), np.uint8), on_bad_image="raise")
    with pytest.raises(RunError, match="--device abacus"):
        r2d2fast.load_run(digits_run, "abacus")
