import random

import pytest
import torch

from r2d2fast.models import PretrainedError, export_safetensors, load_pretrained, make_model, small_convnet


def saved(directory, content, name="weights.pt", **options):
    torch.save(content, directory / name, **options)
    return directory / name


@pytest.fixture
def source():
    """A network whose running statistics have moved."""
    network = small_convnet(channels=1, num_classes=10)
    network(torch.randn(8, 1, 8, 8))
    return network


@pytest.fixture
def target():
    torch.manual_seed(99)
    return small_convnet(channels=1, num_classes=10)


def assert_refused(target, path, match):
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(PretrainedError, match=match) as caught:
        load_pretrained(target, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "legacy.pt", "weights.safetensors"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_loaded_from_every_kind_of_file(source, target, tmp_path, name, wrap, prefix):
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        path.write_bytes(export_safetensors(source, {}))
    else:  # "legacy": the format of PyTorch before 1.6
        saved(tmp_path, wrap(state), name, _use_new_zipfile_serialization=not name.startswith("legacy"))
    assert load_pretrained(target, path) is None
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in target.state_dict().items())


def test_weights_of_another_type_and_files_from_before_batches_were_counted(source, target, tmp_path):
    state = {key: tensor.half() for key, tensor in source.state_dict().items() if tensor.is_floating_point()}
    assert load_pretrained(target, saved(tmp_path, state)) is None
    assert target[0][0].weight.dtype == torch.float32
    torch.testing.assert_close(target[0][0].weight, source[0][0].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(target[0][1].running_mean, source[0][1].running_mean, rtol=1e-3, atol=1e-4)
    assert target[0][1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "classifier", "switches"),
    [
        ("small", "7", {}),
        ("convlarge", "33", {}),
        ("convlarge", "33", {"weight_norm": True}),
        ("lenet2d", "classifier", {}),
        ("torchvision:squeezenet1_1", "classifier.1", {}),
    ],
)
def test_a_classifier_of_another_class_count_stays_as_it_is(tmp_path, name, classifier, switches):
    source, target = (make_model(name, classes, 3, 32, **switches) for classes in (10, 7))
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    path = saved(tmp_path, source.state_dict())
    assert load_pretrained(target, path) == (
        f"{path}: its classifier is for 10 classes, this network's for 7: {classifier} was left at its initial values"
    )
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[key] if key.startswith(f"{classifier}.") else source.state_dict()[key]), key


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        # A missing and an unknown key; a classifier for other features; a wider layer, which is no classifier.
        ({"4.0.weight": None, "extra.weight": (1,)}, r"missing: 4\.0\.weight; unknown: extra\.weight\. Take"),
        ({"7.weight": (7, 65)}, r"of another shape: 7\.weight 7×65 for 10×64"),
        ({"0.0.weight": (20, 1, 3, 3)}, r"of another shape: 0\.0\.weight 20×1×3×3 for 16×1×3×3\."),
        # Other channels, alone and beside another number of classes.
        ({"0.0.weight": (16, 3, 3, 3)}, r"of another shape: 0\.0\.weight 16×3×3×3 for 16×1×3×3\."),
        (
            {"0.0.weight": (16, 3, 3, 3), "7.weight": (7, 64), "7.bias": (7,)},
            r"of another shape: 0\.0\.weight 16×3×3×3 for 16×1×3×3, 7\.weight 7×64 for 10×64",
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_what_does_not_fit(source, target, tmp_path, changes, match):
    state = source.state_dict() | {key: shape and torch.zeros(shape) for key, shape in changes.items()}
    path = saved(tmp_path, {key: tensor for key, tensor in state.items() if tensor is not None})
    assert_refused(target, path, match)
    saved(tmp_path, make_model("resnet18", 10, 3, 32).state_dict())  # of many keys the first are named
    assert_refused(target, path, r"missing: 0\.0\.weight, .* and \d+ more; unknown: conv1\.weight, .* more\.")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_cannot_be_read_or_are_of_other_formats(target, tmp_path, suffix):
    assert_refused(target, tmp_path / f"none{suffix}", "cannot be read: No such file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert_refused(target, tmp_path / f"folder{suffix}", "cannot be read: Is a directory")
    for name in ("weights.bin", "weights", "weights.ckpt"):
        assert_refused(target, tmp_path / name, r"accepted: \.safetensors, \.pt, \.pth")
    for content in (random.Random(0).randbytes(5000), b"some text\n" * 50, b"PK\x03\x04" * 50):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        assert_refused(target, path, "is damaged,? or")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(source, target, tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        path.write_bytes(export_safetensors(source, {}))
    else:
        saved(tmp_path, source.state_dict(), _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for share in (0, 1e-5, 1e-4, 1e-3, 0.01, 0.5, 0.9, 0.9999):
        path.write_bytes(content[: int(share * len(content))])
        assert_refused(target, path, "is damaged")


def test_what_is_no_state_dict_and_that_a_pickled_network_is_never_unpickled(source, target, tmp_path):
    for content, found in (
        *(([1, 2], "a list"), (torch.zeros(3), "a Tensor"), ({}, "an empty dictionary")),
        ({"epoch": 3, "net": {"a": torch.zeros(1)}}, "a dictionary of epoch, net"),
        *(({"state_dict": {"epoch": 3}}, "a dictionary of epoch"), ({1: torch.zeros(1)}, "a dictionary of 1")),
    ):
        path = saved(tmp_path, content)
        assert_refused(target, path, f"holds {found}, no state_dict, nor one under 'state_dict' or 'model'")
    path = saved(tmp_path, source)
    assert_refused(target, path, r"could run any code: save model\.state_dict\(\), not the model")
