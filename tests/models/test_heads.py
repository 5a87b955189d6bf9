import pytest
import torch

from r2d2fast.models import make_model
from r2d2fast.models.heads import FeatureDropout, FeatureScaling


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


def test_dropout_leaves_out_the_same_features_of_a_whole_batch():
    dropout = FeatureDropout(0.75)
    torch.manual_seed(0)
    one, other = dropout(torch.ones(6, 4000)), dropout(torch.ones(6, 4000))
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert (one == one[0]).all()
    assert (one != other).any()
    assert one.mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(dropout.eval()(one), one)


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
