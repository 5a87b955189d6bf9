import numpy as np
import pytest
import torch

from r2d2fast import R2D2Classifier
from r2d2fast.data import Augmentation, Embeddings, consecutive_batches
from r2d2fast.devices import find_device
from tests.blobs import blobs, few

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: torch.from_numpy(x).cuda()])
def test_a_fit_on_a_gpu(device, kind):
    x, y = blobs()
    fit = R2D2Classifier(device="cuda", random_state=0, max_epochs=3).fit(kind(x), few(y))
    assert np.mean(fit.transduction_ == y) > 0.95
    np.testing.assert_array_equal(fit.predict(kind(x))[16:], fit.transduction_[16:])
    assert fit.set_params(device="cpu").score(x, y) > 0.95


def test_a_fit_of_captured_steps_has_the_same_bits(device):
    x, y = blobs()
    one, other = (
        R2D2Classifier(device="cuda", random_state=0, cuda_graphs=on).fit(x, few(y)).label_distributions_
        for on in (True, False)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_rows_on_a_device_without_a_number_are_on_it(device, name):
    part = Embeddings(torch.ones(3, 2), find_device(name))
    assert part.on_device(Augmentation(), 0) is not None
    assert len(list(part.batches(consecutive_batches(torch.arange(3), 2), None, 0))) == 2


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_on_the_device_where_they_fit(device, monkeypatch, fits):
    x, _ = blobs()
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * x.nbytes - 1, 2**40))
    part = Embeddings(x, device)
    assert part._rows.is_cuda == fits
    (batch,) = part.batches(consecutive_batches(torch.arange(240), 240), None, 0)
    assert batch.device == device
    np.testing.assert_array_equal(batch.cpu().numpy(), x)
