import numpy as np
import torch

from r2d2fast.data import consecutive_batches, load_dataset
from r2d2fast.experiments import cli
from r2d2fast.experiments.figure2 import four_panels
from r2d2fast.models import make_model
from tests.train.tiny_run import TINY


def test_figure_2_from_8_by_8_pixels(tmp_path, capsys, threads):
    torch.set_num_threads(1)
    command = ["figure2", "--dataset", "digits", *TINY, "--num-labels", "100", "--run-dir", str(tmp_path)]
    assert cli.main(command) == 0
    assert "figure2.png, and its data in" in capsys.readouterr().out.replace("\n", "")
    data = np.load(tmp_path / "digits/figure2.npz")
    assert {name: (data[name].shape, str(data[name].dtype)) for name in data} == {
        "stage1": ((1437, 2), "float32"),
        "d2": ((1437, 2), "float32"),
        "classes": ((1437,), "int64"),
        "labelled": ((1437,), "bool"),
    }
    assert data["labelled"].sum() == 100
    assert (np.bincount(data["classes"][data["labelled"]]) == 10).all()
    assert not np.allclose(data["stage1"], data["d2"])
    assert (tmp_path / "digits/figure2.png").read_bytes().startswith(b"\x89PNG")
    # By definition, all images at once.
    dataset = load_dataset("digits", tmp_path, torch.device("cpu"), False)
    (images,) = dataset.train.batches(consecutive_batches(torch.arange(1437), 1437), None, 0)
    for name, variant in (("stage1", "lenet2d-stage1"), ("d2", "lenet2d-d2")):
        network = tmp_path / "digits/seed0-split0" / variant / "network.safetensors"
        model = make_model("lenet2d", 10, 1, 8, pretrained=network).eval()
        torch.testing.assert_close(torch.from_numpy(data[name]), model.features(images).detach(), rtol=1e-4, atol=1e-4)
    assert cli.main([*command, "--resume"]) == 0


def test_the_four_panels_show_labelled_and_all_samples_after_each_part():
    points = {"stage 1": np.arange(40.0).reshape(20, 2), "D2": -np.arange(40.0).reshape(20, 2)}
    classes = np.array([0, 1, 2, -1] * 5)
    labelled = np.arange(20) < 3
    figure = four_panels(points, classes, labelled, ["cat", "dog", "owl"])
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == [
        "after stage 1: labelled samples",
        "after stage 1: all samples",
        "after D2: labelled samples",
        "after D2: all samples",
    ]
    for panel, part, shown in zip(panels, ["stage 1"] * 2 + ["D2"] * 2, [labelled, labelled >= 0] * 2, strict=True):
        drawn = np.concatenate([collection.get_offsets() for collection in panel.collections])
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, points[part][shown]))
        # Each class in a colour and under its name; those that nobody knows in grey, without one.
        assert [text.get_text() for text in panel.texts] == ["cat", "dog", "owl"]
        assert len({tuple(collection.get_facecolor()[0]) for collection in panel.collections}) == 3 + (
            -1 in classes[shown]
        )
