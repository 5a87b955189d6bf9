import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from r2d2fast.models.lenet import LeNet2D


def test_logits_are_a_linear_function_of_two_features():
    network = LeNet2D(num_classes=10, in_channels=1, image_size=28)
    images = torch.randn(6, 1, 28, 28)
    features = network.features(images)
    assert features.shape == (6, 2)
    torch.testing.assert_close(network(images), network.classifier(features))


def test_the_features_fill_the_plane_on_both_sides_of_zero():
    features = LeNet2D(10, 1, 28).features(torch.randn(500, 1, 28, 28) * 10)
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
    assert [module.padding for module in LeNet2D(10, 1, 12).body if isinstance(module, torch.nn.Conv2d)] == [
        (2, 2),
        (0, 0),
    ]


def test_two_features_are_enough_to_tell_the_digits_apart():
    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, size=16)
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    network = LeNet2D(10, 1, 16)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for _ in range(20):
        for index in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
    with torch.no_grad():
        assert (network(images[1400:]).argmax(1) == labels[1400:]).float().mean() > 0.8
