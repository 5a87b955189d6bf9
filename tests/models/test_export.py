import json
import sys

import pytest
import safetensors
import torch
from torch import nn

from r2d2fast.models import export_onnx, export_safetensors, load_pretrained, make_model
from r2d2fast.models.conv_large import conv_large
from r2d2fast.models.lenet import LeNet2D
from r2d2fast.models.shake_shake import ShakeShake


@pytest.fixture
def network():
    """A network in training mode and channels last, with batch norm in groups, whose running statistics have moved."""
    network = make_model("small", 10, 3, 8, bn_groups=2).to(memory_format=torch.channels_last)
    network(torch.randn(8, 3, 8, 8))
    return network


def test_safetensors_hold_the_weights_and_the_metadata(network, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(export_safetensors(network, {"backbone": "small", "classes": "0,1"}))
    state = network.state_dict()
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"backbone": "small", "classes": "0,1"}
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), state[key]) for key in state)
    again = make_model("small", 10, 3, 8)
    load_pretrained(again, path)
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(again.eval()(images), network.eval()(images))


def test_the_same_network_gives_the_same_bytes_in_the_order_of_names(network, tmp_path):
    about = {name: "é" * place for place, name in enumerate("zyxwvutsrqponm")}
    contents = {export_safetensors(network, metadata) for metadata in (about, dict(reversed(about.items())))}
    assert len(contents) == 1
    (content,) = contents
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(content[8 : 8 + length])["__metadata__"]) == sorted(about)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == about


def test_tensors_that_share_memory_are_each_written_out(tmp_path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    path = tmp_path / "model.safetensors"
    path.write_bytes(export_safetensors(nn.Sequential(first, second), {}))
    again = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_pretrained(again, path)
    assert torch.equal(again[0].weight, first.weight)
    assert torch.equal(again[1].weight, first.weight)


def assert_same_logits(content, network, shape):
    import onnx.reference  # its own, slow, definition of every operator

    model = onnx.load_from_string(content)
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    sizes = images.type.tensor_type.shape.dim
    assert sizes[0].dim_param == "batch"
    assert [size.dim_value for size in sizes[1:]] == list(shape)
    evaluator = onnx.reference.ReferenceEvaluator(model)
    network.eval()
    for count in (1, 3):
        batch = torch.randn(count, *shape)
        with torch.no_grad():
            expected = network(batch)
        (result,) = evaluator.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "side"),
    [
        pytest.param(make_model("small", 10, 3, 8, bn_groups=2).to(memory_format=torch.channels_last), 8, id="small"),
        *(
            pytest.param(network, 12, id=type(network).__name__, marks=pytest.mark.slow)
            for network in (
                LeNet2D(10, in_channels=3, image_size=12),
                conv_large(10, in_channels=3, input_noise=True, weight_norm=True),
                ShakeShake(10, in_channels=3, width=2),
            )
        ),
    ],
)
@pytest.mark.extra("onnx", "onnxscript")
def test_onnx_gives_the_same_logits_for_any_number_of_images(network, side):
    network.train()
    content = export_onnx(network, (3, side, side))
    assert all(module.training for module in network.modules())
    assert_same_logits(content, network, (3, side, side))


def test_without_onnx_the_message_says_how_to_get_it(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'r2d2fast\[onnx\]'"):
        export_onnx(network, (3, 8, 8))
