import pytest
import torch

from r2d2fast.models import make_model
from r2d2fast.models.heads import FeatureScaling, LinearOfSomeFeatures


def head(name, **options):
    torch.manual_seed(0)
    return make_model(name, 4, 12, 0, **options)


def test_features_are_standardised_and_samples_have_the_length_asked_for():
    x = torch.randn(50, 12, dtype=torch.float64) * torch.arange(1, 13) + 100
    scaling = FeatureScaling(12, 5.0)
    mean, std = x.mean(0), x.std(0, correction=0)
    scaling.set_statistics(mean, std)
    standardised = (x - mean) / std
    expected = 5 * standardised / standardised.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaling(x.float()), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaling(x.half()).norm(dim=1), torch.full((50,), 5.0))


def test_a_sample_at_the_mean_gives_zeros():
    scaling = FeatureScaling(3, 10.0)
    assert torch.equal(scaling(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_scaling_is_stored_with_the_network():
    network = head("linear", feature_length=3.0)
    network.scaling.set_statistics(torch.full((12,), 2.0), torch.full((12,), 4.0))
    again = head("linear")
    again.load_state_dict(network.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(again.eval()(x), network.eval()(x))
    assert not any(name.startswith("scaling") for name, _ in network.named_parameters())


def kept_columns(layer):
    """The features that the layer's last backward pass has a gradient for."""
    return layer.weight.grad.abs().sum(0).nonzero().flatten()


def test_a_batch_has_some_features_scaled_up_and_the_same_for_all_its_samples():
    torch.manual_seed(0)
    layer = LinearOfSomeFeatures(40, 3, dropout=0.75).double()
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 3, dtype=torch.float64)
    seen = []
    for _ in range(3):
        layer.zero_grad()
        x.grad = None
        found = layer(x)
        found.backward(upstream)
        columns = kept_columns(layer)
        assert len(columns) == layer.kept == 10
        dropped = torch.zeros(6, 40, dtype=torch.float64)
        dropped[:, columns] = 4 * x.detach()[:, columns]
        torch.testing.assert_close(found, dropped @ layer.weight.T + layer.bias)
        torch.testing.assert_close(layer.weight.grad, upstream.T @ dropped)
        torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
        mask = (dropped != 0) * 4.0
        torch.testing.assert_close(x.grad, upstream @ layer.weight.detach() * mask)
        seen.append(tuple(columns.tolist()))
    assert len(set(seen)) == 3
    layer.eval()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("features", "dropout", "kept"), [(1, 0.9, 1), (7, 0.5, 3), (8, 0.5, 4), (8, 0.0, 8)])
def test_at_least_one_feature_is_kept(features, dropout, kept):
    layer = LinearOfSomeFeatures(features, 2, dropout)
    layer(torch.randn(5, features)).sum().backward()
    assert len(kept_columns(layer)) == kept


def test_the_first_layer_alone_leaves_features_out():
    for name, first in (("linear", "classifier"), ("mlp", "hidden1")):
        network = head(name, dropout=0.5)
        layers = [key for key, layer in network.named_modules() if isinstance(layer, LinearOfSomeFeatures)]
        assert layers == [first]
        assert network.get_submodule(first).kept == 6


def test_hidden_layers():
    assert [tuple(p.shape) for p in head("linear").parameters()] == [(4, 12), (4,)]
    assert [tuple(p.shape) for p in head("mlp").parameters()][::2] == [(256, 12), (4, 256)]
    sizes = [tuple(p.shape) for p in head("mlp", hidden_layer_sizes=(6, 5)).parameters()]
    assert sizes == [(6, 12), (6,), (5, 6), (5,), (4, 5), (4,)]
    assert head("mlp", hidden_layer_sizes=(6, 5))(torch.randn(3, 12)).shape == (3, 4)


def test_images_and_embeddings_are_told_apart():
    with pytest.raises(
        ValueError, match="backbone 'small' takes images, and these are embeddings; accepted: linear, mlp"
    ):
        make_model("small", 4, 12, 0)
    with pytest.raises(ValueError, match="backbone 'linear' takes embeddings, and these are images; accepted: small, "):
        make_model("linear", 4, 3, 8)
