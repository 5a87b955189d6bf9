import torch

from r2d2fast.models.lenet import LeNet2D


def test_logits_are_a_linear_function_of_two_features_that_fill_the_plane_on_both_sides_of_zero():
    network, images = LeNet2D(10, 1, 28), torch.randn(500, 1, 28, 28) * 10
    features = network.features(images)
    assert features.shape == (500, 2)
    torch.testing.assert_close(network(images), network.classifier(features))
    spread = features - features.mean(0)
    assert (spread.min(0).values < 0).all()
    # What a ReLU after the layer would make of the smaller ones: equal zeros.
    assert len(features[:, 0].unique()) > 490
    assert len(features[:, 1].unique()) > 490


def test_convolutions_are_those_of_lenet_5():
    network = LeNet2D(10, 1, 28)
    shapes = [tuple(parameter.shape) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (2, 84), (10, 2)]


def test_small_images_are_padded_so_that_a_2_by_2_map_is_left_of_8_pixels():
    network = LeNet2D(10, 1, 8)
    assert network.body[:6](torch.zeros(1, 1, 8, 8)).shape == (1, 16, 2, 2)
    convolutions = [module for module in LeNet2D(10, 1, 12).body if isinstance(module, torch.nn.Conv2d)]
    assert [module.padding for module in convolutions] == [(2, 2), (0, 0)]
