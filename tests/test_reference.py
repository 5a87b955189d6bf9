"""The definition against autograd, finite differences and the paper's own identities."""

import math

import pytest
import torch

from r2d2fast import reference
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.testing import make_bank

WEIGHTS = {"alpha": 0.1, "beta": 0.03}


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_gradients_are_those_of_autograd(class_loss):
    bank = make_bank(6, 7, labelled_every=0, dtype=torch.float32)
    index = torch.tensor([4, 0, 2])
    before = bank.pseudo_logits[index].double()
    logits = (torch.randn(3, 7, dtype=torch.float64) * 3).requires_grad_()
    rows = before.clone().requires_grad_()
    loss = reference.d2_loss(logits, rows, class_loss=class_loss, normalizer=5.0, **WEIGHTS)
    loss.backward()

    step = reference.d2_step(
        logits, index, bank, class_loss=class_loss, label_lr=20.0, normalizer=5.0, update_normalizer=2.5, **WEIGHTS
    )
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.grad, logits.grad)
    # rows.grad is divided by D = 5, the update by D_u = 2.5.
    torch.testing.assert_close(bank.pseudo_logits[index], (before - 20.0 * rows.grad * 5.0 / 2.5).float())


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_gradients_are_finite_differences(class_loss):
    def loss(logits, rows):
        return reference.d2_loss(logits, rows, class_loss=class_loss, normalizer=1.0, alpha=0.3, beta=0.2)

    inputs = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_a_row_by_hand():
    """p̂ = (3/4, 1/4), p̃ = (1/2, 1/2): KL = log 2 − H(p̂), worked with pencil and paper."""
    bank = make_bank(1, 2, labelled_every=0)
    bank.pseudo_logits.zero_()
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    step = reference.d2_step(logits, torch.tensor([0]), bank, label_lr=8.0, **WEIGHTS)
    entropy = math.log(4.0) - 0.75 * math.log(3.0)
    divergence = math.log(2.0) - entropy
    assert step.loss.item() == pytest.approx(0.1 * divergence + 0.03 * entropy, rel=1e-12)
    # Eq. 5 and the entropy's gradient: p(log p − log q − KL)·α − β p(log p + H), for p = 3/4.
    first = 0.75 * (0.1 * (math.log(1.5) - divergence) - 0.03 * (math.log(0.75) + entropy))
    assert step.grad[0].tolist() == pytest.approx([first, -first], rel=1e-12)
    # Eq. 7: ỹ − λα(p̃ − p̂) = −8·0.1·(1/2 − 3/4, 1/2 − 1/4).
    assert bank.pseudo_logits[0].tolist() == pytest.approx([0.2, -0.2], rel=1e-6)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_the_sum_of_pseudo_logits_is_invariant(class_loss):
    """Eq. 13."""
    bank = make_bank(50, 11, labelled_every=0)
    before = bank.pseudo_logits.double().sum(1)
    for _ in range(20):
        reference.d2_step(torch.randn(50, 11) * 3, torch.arange(50), bank, label_lr=50.0, class_loss=class_loss)
    torch.testing.assert_close(bank.pseudo_logits.double().sum(1), before, atol=1e-4, rtol=0)


def test_theorem_1_at_the_fixed_point_of_the_gradient():
    """Where ∂L/∂ŷ = 0, p̃_n is proportional to p̂_n^(1 − β/α)."""
    alpha, beta = 0.1, 0.03
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    bank = make_bank(1, 3, labelled_every=0)
    bank.pseudo_logits.copy_((1 - beta / alpha) * p.log())
    step = reference.d2_step(p.log(), torch.tensor([0]), bank, alpha=alpha, beta=beta, update=False)
    assert step.grad.abs().max() < 1e-8


def test_labelled_rows_are_scaled_one_hot_and_own_nothing():
    """Labelled samples own no row: log p̃ = K·[j = y] − log(e^K + N − 1)."""
    bank = make_bank(3, 4, labelled_every=1, label_scale=10.0)
    assert bank.pseudo_logits.shape == (0, 4)
    labels = bank.hard_labels()
    step = reference.d2_step(torch.zeros(3, 4), torch.arange(3), bank, alpha=1.0, beta=0.0)
    log_sum = math.log(math.exp(10.0) + 3)
    divergence = -math.log(4.0) - (0.25 * 10.0 - log_sum)
    assert step.loss.item() == pytest.approx(divergence, rel=1e-12)
    assert bool((step.grad.argmin(1) == labels).all())


def test_duplicates_are_found_in_memory_proportional_to_the_batch():
    """A whole data set is predicted in one call; a [B, B] comparison would take 10 GB here."""
    slots = torch.arange(100_000) % 60_000
    last = reference.last_occurrence(slots)
    assert last.sum() == 60_000
    assert not last[:40_000].any()
