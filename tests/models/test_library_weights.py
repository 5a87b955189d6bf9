"""Weights of torchvision and timm by name."""

import pytest
import torch
import torchvision

from r2d2fast.models import DEFAULT, PretrainedError, make_model, own_images

FILE = torchvision.models.get_model_weights("resnet18")["DEFAULT"].url.rpartition("/")[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of torch.hub's downloads, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_weights_in_the_cache_are_taken_but_for_the_classifier(name, cache, caplog):
    there = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(there, cache / FILE)
    own = make_model(name, 10, 3, 64, pretrained=DEFAULT).state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in there.items() if not key.startswith("fc"))
    assert own["fc.weight"].shape == (10, 512)
    assert f"those of {name}: its classifier is for 1000 classes, this network's for 10" in caplog.text


def test_where_there_is_no_network_the_file_and_its_place_are_named(cache, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(PretrainedError) as error:
        make_model("torchvision:resnet18", 10, 3, 64, pretrained=DEFAULT)
    assert f"fetch https://download.pytorch.org/models/{FILE} elsewhere, and put it into {cache / FILE}" in str(
        error.value
    )
    assert "--pretrained FILE" in str(error.value)


def test_a_network_without_weights_of_its_own():
    with pytest.raises(
        PretrainedError, match=r"'small' has no weights of its own; accepted: torchvision:NAME, timm:NAME"
    ):
        make_model("small", 10, 1, 8, pretrained=DEFAULT)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b1", "vit_b_16", "swin_v2_t"])
def test_the_images_that_torchvision_s_weights_want(name):
    wanted = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    own = own_images(f"torchvision:{name}")
    assert ([own.image_size], [own.resize]) == (wanted.crop_size, wanted.resize_size)
    assert (list(own.mean), list(own.std)) == (list(wanted.mean), list(wanted.std))
    assert own.interpolation == wanted.interpolation.value
    assert own_images("small") is None


@pytest.mark.extra("timm")
def test_the_images_that_timm_s_weights_want_and_where_they_are(monkeypatch):
    import timm

    own = own_images("timm:test_vit")
    wanted = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert (own.image_size, own.mean, own.std, own.interpolation) == (160, wanted["mean"], wanted["std"], "bicubic")

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(
        PretrainedError, match=r"fetch https://huggingface.co/timm/test_vit\S*/resolve/main/model.safetensors"
    ):
        make_model("timm:test_vit", 10, 3, 160, pretrained=DEFAULT)
