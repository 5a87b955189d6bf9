import json
import math

import pytest
import torch

from r2d2fast import PseudoLabelBank, d2_step
from r2d2fast.train.methods import theorems
from r2d2fast.train.methods.theorems import TheoremMetrics
from r2d2fast.train.ranks import Ranks

N = 7


def make(labels, alpha=0.1, beta=0.03, class_loss="kl_reverse", dtype=torch.float32):
    """Metrics of a bank with random rows, which have just been predicted."""
    bank = PseudoLabelBank(torch.tensor(labels), N, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    bank.pseudo_logits.copy_(3 * torch.randn(bank.pseudo_logits.shape, generator=generator))
    metrics = TheoremMetrics(bank, alpha, beta, class_loss)
    metrics.predicted()
    return metrics


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def definition(logits, pseudo_logits, alpha, beta):
    """|p̃_n − exp(−L/α) p̂_n^(1 − β/α)| and whether p̃_n ≤ p̂_n, of one sample, in Python's floats."""
    p, q = softmax(logits), softmax(pseudo_logits)
    loss = sum(alpha * a * math.log(a / b) - beta * a * math.log(a) for a, b in zip(p, q, strict=True))
    n = p.index(max(p))
    return abs(q[n] - math.exp(-loss / alpha) * p[n] ** (1 - beta / alpha)), q[n] <= p[n]


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.03), (0.5, 0.0), (0.1, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gap_and_share_against_the_definition_over_unlabelled_rows_only(alpha, beta, dtype):
    metrics = make([-1, 2, -1, -1, 0, -1], alpha, beta, dtype=dtype)
    logits = (2 * torch.randn(6, N, generator=torch.Generator().manual_seed(1))).to(dtype)
    index = torch.tensor([5, 1, 0, 3, 4, 0])
    # Two batches, to be averaged over their rows.
    metrics.measure(logits[:2], index[:2])
    metrics.measure(logits[2:], index[2:])
    rows = {0: 0, 2: 1, 3: 2, 5: 3}
    expected = [
        definition(logits[i].tolist(), metrics.bank.pseudo_logits[rows[s]].tolist(), alpha, beta)
        for i, s in enumerate(index.tolist())
        if s in rows
    ]
    assert len(expected) == 4
    read = metrics.read(Ranks())
    assert read["theorem1_gap"] == pytest.approx(sum(gap for gap, _ in expected) / 4, rel=1e-10)
    assert read["theorem2_share"] == sum(flatter for _, flatter in expected) / 4
    assert 0 < read["theorem2_share"] < 1
    # Reading begins anew.
    assert metrics.read(Ranks()) == {"theorem1_gap": None, "theorem2_share": None, "sum_drift": 0.0}


@pytest.mark.parametrize(("class_loss", "alpha"), [("kl", 0.1), ("mse", 0.1), ("kl_reverse", 0.0)])
def test_theorem_1_says_nothing_of_other_losses(class_loss, alpha):
    metrics = make([-1, -1], alpha, 0.0, class_loss)
    metrics.measure(torch.randn(2, N, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))
    read = metrics.read(Ranks())
    assert read["theorem1_gap"] is None
    assert read["theorem2_share"] in (0.0, 0.5, 1.0)


def test_a_point_where_the_gradient_vanishes_fulfils_both_theorems():
    metrics = make([-1], alpha=0.1, beta=0.03)
    metrics.bank.pseudo_logits.copy_(torch.linspace(-2, 2, N)[None])
    # By the definition ∂L/∂ŷ = 0 where p̂^(1 − β/α) ∝ p̃: ŷ = ỹ / (1 − β/α).
    logits = metrics.bank.pseudo_logits.double() / (1 - 0.03 / 0.1)
    _, grad = d2_step(logits, torch.tensor([0]), metrics.bank, update=False, backend="reference")
    assert grad.abs().max() < 1e-8
    metrics.measure(logits, torch.tensor([0]))
    read = metrics.read(Ranks())
    assert read["theorem1_gap"] < 1e-7
    assert read["theorem2_share"] == 1


def test_where_logits_follow_faster_than_pseudo_labels_both_theorems_come_true():
    """The logits themselves are trained, by a learning rate that falls to 0, and the pseudo-labels with them."""
    metrics, index = make([-1] * 50), torch.arange(50)
    logits = metrics.bank.pseudo_logits.clone()
    metrics.measure(logits, index)
    predicted = metrics.read(Ranks())
    for step in range(1000):
        _, grad = d2_step(logits, index, metrics.bank, label_lr=0.1, normalizer=1.0)
        logits -= 10 * (1 - step / 1000) * grad
    metrics.measure(logits, index)
    converged = metrics.read(Ranks())
    assert converged["theorem1_gap"] < predicted["theorem1_gap"] / 5
    assert converged["theorem2_share"] == 1
    probs, pseudo_probs = logits.softmax(1), metrics.bank.probs(index)
    n = probs.argmax(1, keepdim=True)
    assert (pseudo_probs.gather(1, n) < probs.gather(1, n)).all()


@pytest.mark.parametrize("pieces", [1, 2, 100])
def test_drift_is_the_mean_change_of_a_rows_sum_since_the_prediction(monkeypatch, pieces):
    monkeypatch.setattr(theorems, "_ELEMENTS", 4 * N // pieces)
    metrics = make([-1, 3, -1, -1, -1])
    assert metrics.read(Ranks())["sum_drift"] == 0
    metrics.bank.pseudo_logits[0, 2] += 0.5
    metrics.bank.pseudo_logits[3] -= 0.25
    assert metrics.read(Ranks())["sum_drift"] == pytest.approx((0.5 + 0.25 * N) / 4, rel=1e-6)
    metrics.predicted()
    assert metrics.read(Ranks())["sum_drift"] == 0


@pytest.mark.parametrize("class_loss", ["kl_reverse", "kl", "mse"])
def test_steps_of_d2_keep_the_sums(class_loss):
    metrics = make([-1] * 50, class_loss=class_loss)
    before = metrics.bank.pseudo_logits.clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = torch.randn(50, N, generator=generator)
        d2_step(logits, torch.arange(50), metrics.bank, class_loss=class_loss)
    moved = (metrics.bank.pseudo_logits - before).abs().sum(1).mean()
    assert metrics.read(Ranks())["sum_drift"] < 1e-5 * moved


def test_epochs_of_stage_2_have_the_metrics_and_the_others_do_not(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    keys = {"theorem1_gap", "theorem2_share", "sum_drift"}
    assert [keys <= row.keys() for row in rows] == [row["stage"] == 2 for row in rows]
    assert [keys & row.keys() for row in rows if row["stage"] != 2] == [set()] * 6
    for row in rows[4:9]:
        assert 0 < row["theorem1_gap"] < 1
        assert 0 <= row["theorem2_share"] <= 1
        assert 0 < row["sum_drift"] < 1e-5
