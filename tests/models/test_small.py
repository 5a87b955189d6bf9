import torch

from r2d2fast.models import small_convnet


def test_logits_of_a_batch_and_gradients_for_every_parameter():
    torch.manual_seed(0)
    model = small_convnet(channels=1, num_classes=10)
    logits = model(torch.randn(7, 1, 8, 8))
    assert logits.shape == (7, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_prediction_in_eval_mode_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = small_convnet(channels=1, num_classes=10)
    images = torch.randn(16, 1, 8, 8)
    model(images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in small_convnet(1, 10).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
