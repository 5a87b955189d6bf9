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


def assert_loaded(target, source):
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in target.state_dict().items())


def assert_refused(target, path, match):
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(PretrainedError, match=match) as caught:
        load_pretrained(target, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_safetensors(source, target, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(export_safetensors(source, {}))
    assert load_pretrained(target, path) is None
    assert_loaded(target, source)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_torch_save(source, target, tmp_path, name, wrap, prefix):
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    assert load_pretrained(target, saved(tmp_path, wrap(state), name)) is None
    assert_loaded(target, source)


def test_the_format_of_torch_before_1_6(source, target, tmp_path):
    path = saved(tmp_path, source.state_dict(), _use_new_zipfile_serialization=False)
    load_pretrained(target, path)
    assert_loaded(target, source)


def test_weights_of_another_type_are_converted(source, target, tmp_path):
    halves = {
        key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in source.state_dict().items()
    }
    load_pretrained(target, saved(tmp_path, halves))
    assert target[0][0].weight.dtype == torch.float32
    torch.testing.assert_close(target[0][0].weight, source[0][0].weight, rtol=1e-3, atol=1e-4)


def test_files_from_before_batches_were_counted(source, target, tmp_path):
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert load_pretrained(target, saved(tmp_path, state)) is None
    assert torch.equal(target[0][1].running_mean, source[0][1].running_mean)
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


def test_another_network_is_refused_with_its_keys(target, tmp_path):
    path = saved(tmp_path, make_model("resnet18", 10, 3, 32).state_dict())
    assert_refused(
        target, path, r"do not fit.*missing: 0\.0\.weight, .* and \d+ more; unknown: conv1\.weight, .* more\."
    )


def test_a_missing_and_an_unknown_key_are_named(source, target, tmp_path):
    state = source.state_dict()
    state["extra.weight"] = state.pop("4.0.weight")
    assert_refused(target, saved(tmp_path, state), r"missing: 4\.0\.weight; unknown: extra\.weight\. Take")


def test_other_shapes_are_named_with_both(target, tmp_path):
    path = saved(tmp_path, small_convnet(channels=3, num_classes=10).state_dict())
    assert_refused(target, path, r"of another shape: 0\.0\.weight 16×3×3×3 for 16×1×3×3\.")


def test_a_classifier_for_other_features_is_refused(source, target, tmp_path):
    state = source.state_dict()
    state["7.weight"] = torch.zeros(7, 65)
    assert_refused(target, saved(tmp_path, state), r"of another shape: 7\.weight 7×65 for 10×64")


def test_a_wider_layer_is_not_taken_for_a_classifier(source, target, tmp_path):
    state = source.state_dict()
    state["0.0.weight"] = torch.zeros(20, 1, 3, 3)
    assert_refused(target, saved(tmp_path, state), r"of another shape: 0\.0\.weight 20×1×3×3 for 16×1×3×3\.")


def test_another_shape_beside_another_class_count_is_refused(target, tmp_path):
    path = saved(tmp_path, small_convnet(channels=3, num_classes=7).state_dict())
    assert_refused(target, path, r"of another shape: 0\.0\.weight 16×3×3×3 for 16×1×3×3, 7\.weight 7×64 for 10×64")


@pytest.mark.parametrize("name", ["weights.bin", "weights", "weights.ckpt"])
def test_other_suffixes_are_refused(target, tmp_path, name):
    assert_refused(target, tmp_path / name, r"accepted: \.safetensors, \.pt, \.pth")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_cannot_be_read(target, tmp_path, suffix):
    assert_refused(target, tmp_path / f"none{suffix}", "cannot be read: No such file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert_refused(target, tmp_path / f"folder{suffix}", "cannot be read: Is a directory")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0, 1e-5, 1e-4, 1e-3, 0.01, 0.5, 0.9, 0.9999])
def test_truncated_files(source, target, tmp_path, kind, share):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        path.write_bytes(export_safetensors(source, {}))
    else:
        saved(tmp_path, source.state_dict(), _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(target, path, "is damaged")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [random.Random(0).randbytes(5000), b"some text\n" * 50, b"PK\x03\x04" * 50])
def test_files_of_other_formats(target, tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert_refused(target, path, "is damaged,? or")


def test_a_whole_pickled_network_is_never_unpickled(source, target, tmp_path):
    path = saved(tmp_path, source)
    assert_refused(target, path, r"could run any code: save model\.state_dict\(\), not the model")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "a list"),
        (torch.zeros(3), "a Tensor"),
        ({}, "an empty dictionary"),
        ({"epoch": 3, "net": {"a": torch.zeros(1)}}, "a dictionary of epoch, net"),
        ({"state_dict": {"epoch": 3}}, "a dictionary of epoch"),
        ({1: torch.zeros(1)}, "a dictionary of 1"),
    ],
)
def test_what_is_no_state_dict(target, tmp_path, content, found):
    path = saved(tmp_path, content)
    assert_refused(target, path, f"holds {found}, no state_dict, nor one under 'state_dict' or 'model'")
