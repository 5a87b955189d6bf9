import base64
import io

import numpy as np
import pytest
from made_runs import dataset, make_run, record
from PIL import Image

from r2d2fast.data import DataError
from r2d2fast.report import gallery as module
from r2d2fast.report.gallery import image_loader, make_gallery, most_changed, surest_mistakes
from r2d2fast.report.groups import make_groups
from r2d2fast.report.runs import read_run
from r2d2fast.train.errors import ConfigError

# Sample       0     1    2    3    4    5    6
TRUTH = [0, 1, 2, 0, 1, 2, -1]
FIRST = [-1, -1, 0, 0, 2, 2, 1], [1, 1, 0.5, 0.6, 0.9, 0.4, 0.8]
SECOND = [-1, -1, 0, 0, 2, 1, 0], [1, 1, 0.7, 0.7, 0.5, 0.5, 0.5]
LEARNED = [-1, -1, 2, 1, 1, 1, 0], [1, 1, 0.9, 0.7, 0.75, 0.95, 0.25]
AFTERWARDS = [-1, -1, 0, 0, 0, 0, 0], [1] * 7


def group_of(directory, **keywords):
    (group,) = make_groups([read_run(make_run(directory, **keywords))])
    return group


@pytest.fixture
def group(tmp_path):
    made = group_of(tmp_path / "run")
    record(tmp_path / "run", "stage2-00000-predicted", *FIRST)
    record(tmp_path / "run", "stage2-00001-predicted", *SECOND)
    record(tmp_path / "run", "stage2-00003-learned", *LEARNED)
    record(tmp_path / "run", "stage3-00000-predicted", *AFTERWARDS)
    return made


def pixels(uri):
    scheme, _, data = uri.partition(",")
    assert scheme == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_samples_that_changed_most_and_the_surest_mistakes(group):
    made = make_gallery(group, lambda run: dataset(TRUTH))
    # 2, 3, 4, 5 and 6 changed, of which 4 was sure of both classes; 3 and 5 are wrong, nobody knows what 6 is.
    assert [item.name for item in made.changed] == [f"image {number}" for number in (4, 2, 5, 3, 6)]
    assert [item.name for item in made.mistakes] == ["image 5", "image 3"]
    assert [item.truth for item in made.changed] == ["one", "two", "two", "zero", None]
    assert [item.right for item in made.changed] == [True, True, False, False, None]
    assert made.changed[0].history == "two (90 … 50 %) → one (75 %)"
    assert made.changed[2].history == "two (40 %) → one (50 … 95 %)"
    assert made.missing == ""
    assert made.summary == (
        "5 of 5 pseudo-labels changed their class between the first prediction and the end of stage 2 "
        "(2 from wrong to right, 2 from right to wrong, 0 from wrong to wrong). 2 of 4 are wrong then."
    )


def test_each_sample_is_shown_by_its_own_image(group):
    made = make_gallery(group, lambda run: dataset(TRUTH))
    # Of grey values 20 … 60, stretched to 0 … 255.
    shown = {item.name: pixels(item.image) for item in (*made.changed, *made.mistakes)}
    for name, image in shown.items():
        assert image.shape == (4, 4)
        np.testing.assert_allclose(image, 255 * (int(name.split()[1]) - 2) / 4, atol=1)


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 4)), (2, (4, 4)), (3, (4, 4, 3)), (4, (4, 4))])
def test_images_of_any_number_of_channels(group, channels, shape):
    made = make_gallery(group, lambda run: dataset(TRUTH, channels=channels))
    image = pixels(made.changed[-1].image)
    assert image.shape == shape
    assert image.reshape(16, -1)[0, 0] == 255


def test_no_more_than_there_is_room_for_and_large_images_are_shrunk(group, monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 1)
    monkeypatch.setattr(module, "LARGEST_SIDE", 2)
    made = make_gallery(group, lambda run: dataset(TRUTH))
    assert [item.name for item in (*made.changed, *made.mistakes)] == ["image 4", "image 5"]
    assert pixels(made.changed[0].image).shape == (2, 2)


def test_of_an_unfinished_run_the_last_prediction_counts(tmp_path):
    group = group_of(tmp_path / "run", done=3)
    record(tmp_path / "run", "stage2-00000-predicted", *FIRST)
    record(tmp_path / "run", "stage2-00001-predicted", *SECOND)
    made = make_gallery(group, lambda run: dataset(TRUTH))
    assert [item.name for item in made.changed] == ["image 6", "image 5"]
    assert "between the first prediction and the prediction after 1 epoch of stage 2" in made.summary


def test_a_finished_run_is_shown_rather_than_another(tmp_path):
    runs = [make_run(tmp_path / "a", done=3), make_run(tmp_path / "b", {"seed": 1})]
    (group,) = make_groups([read_run(directory) for directory in runs])
    assert make_gallery(group, lambda run: dataset(TRUTH)).run.directory == tmp_path / "b"


def test_ties_are_in_the_order_of_the_samples_and_labelled_ones_are_no_mistakes():
    recorded = np.array([-1, 1, 1, 1]), np.float16([1, 0.5, 0.5, 0.5])
    assert surest_mistakes(recorded, np.array([0, 0, 0, -1])).tolist() == [1, 2]
    assert most_changed((np.array([-1, 0, 0, 1]), recorded[1]), recorded).tolist() == [1, 2]


def test_nothing_changed_and_nothing_wrong(tmp_path):
    group = group_of(tmp_path / "run")
    for name in ("stage2-00000-predicted", "stage2-00003-learned"):
        record(tmp_path / "run", name, [-1, -1, 2, 0, 1, 2, 1], [1] * 7)
    made = make_gallery(group, lambda run: dataset(TRUTH))
    assert (made.changed, made.mistakes, made.missing) == ([], [], "")
    assert made.summary.startswith("0 of 5 pseudo-labels changed their class")
    assert made.summary.endswith("the end of stage 2. 0 of 4 are wrong then.")


def missing(error):
    def load(run):
        raise error

    return load


def test_without_the_data_set_there_is_a_line_that_says_why(group):
    made = make_gallery(group, missing(ConfigError("digits: put them into data/digits")))
    assert made.missing.startswith("No gallery: digits: put them into data/digits.")
    assert "--data-dir" in made.missing


def test_a_data_set_without_its_files_is_named(tmp_path):
    group = group_of(tmp_path / "run", config={"dataset": "mnist"})
    record(tmp_path / "run", "stage2-00000-predicted", *FIRST)
    made = make_gallery(group, image_loader(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in made.missing


def test_a_data_set_unknown_here_is_named(tmp_path):
    group = group_of(tmp_path / "run", config={"dataset": "letters"})
    record(tmp_path / "run", "stage2-00000-predicted", *FIRST)
    assert "the data set letters is unknown" in make_gallery(group, image_loader(tmp_path)).missing


def test_another_data_set_than_that_of_the_run_shows_nothing(group):
    for other in (dataset(TRUTH[:-1]), dataset(TRUTH, ("zero", "one"))):
        assert "are not those of" in make_gallery(group, lambda run, other=other: other).missing


def test_an_image_that_cannot_be_read_costs_the_gallery_alone(group, monkeypatch):
    made = dataset(TRUTH)
    monkeypatch.setattr(made.train, "batches", lambda *_: missing(DataError("a.png: damaged"))(None))
    assert make_gallery(group, lambda run: made).missing.startswith("No gallery: a.png: damaged")


def test_a_damaged_record_is_named(group):
    path = group.runs[0].directory / "pseudo_labels" / "stage2-00001-predicted.npz"
    path.write_bytes(b"damaged")
    assert make_gallery(group, lambda run: dataset(TRUTH)).missing.startswith(f"No gallery: {path} cannot be read")


@pytest.mark.parametrize(
    ("stages", "said"), [([1], "has no stage 2"), ([1, 2, 3], "has recorded no pseudo-labels yet")]
)
def test_runs_without_records(tmp_path, stages, said):
    assert (
        said in make_gallery(group_of(tmp_path / "run", config={"stages": stages}), missing(AssertionError())).missing
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_images_of_a_folder_are_those_that_the_run_has_not_held_out(tmp_path, fraction):
    for number in range(16):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 10 * number, np.uint8)).save(path)
    group = group_of(tmp_path / "run", config={"dataset": "folder", "test_fraction": fraction})
    trained_on = round(16 * (1 - fraction))
    for name, label in (("stage2-00000-predicted", 0), ("stage2-00003-learned", 1)):
        record(tmp_path / "run", name, [label] * trained_on, [1] * trained_on)
    made = make_gallery(group, image_loader(tmp_path / "images"))
    assert made.missing == ""
    assert made.summary.startswith(f"{trained_on} of {trained_on} pseudo-labels changed")


def test_a_data_set_is_loaded_once_whatever_the_split_was(tmp_path, monkeypatch):
    calls = []
    load_data = module.load_data
    monkeypatch.setattr(module, "load_data", lambda config, ranks: calls.append(config) or load_data(config, ranks))
    load = image_loader(tmp_path)
    runs = [read_run(make_run(tmp_path / str(number), {"split_file": "gone.txt", "seed": number})) for number in (0, 1)]
    assert len(load(runs[0]).train) == len(load(runs[1]).train) > 1000
    (config,) = calls
    assert (config.split_file, config.num_labels) == (None, 0)
