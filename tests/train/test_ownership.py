"""Which rows each rank's bank has, and what is said of all samples: of two ranks, whose sums are made here."""

import torch

from r2d2fast import PseudoLabelBank
from r2d2fast.data import BatchSampler
from r2d2fast.train import ownership
from r2d2fast.train.ownership import Ownership
from r2d2fast.train.ranks import Ranks

LABELS = torch.tensor([-1, 2, -1, -1, 0, -1, -1, 1, -1, -1, -1])
UNLABELLED, LABELLED = (LABELS < 0).nonzero().flatten(), (LABELS >= 0).nonzero().flatten()


class OneOfTwo(Ranks):
    """A rank whose sums are left to the test."""

    def sum_(self, tensor):
        return tensor


def both(prediction=0):
    """The ownership of each rank, and a bank of random rows for it."""
    pairs = []
    for rank in (0, 1):
        owned = Ownership(LABELS, BatchSampler(LABELLED, UNLABELLED, 0, rank, 2), OneOfTwo(rank, 2))
        owned.deal(prediction)
        bank = PseudoLabelBank(owned.bank_labels(), 3)
        bank.pseudo_logits.copy_(torch.randn(len(owned.samples), 3, generator=torch.Generator().manual_seed(rank)))
        pairs.append((owned, bank))
    return pairs


def test_each_unlabelled_sample_has_a_row_on_one_rank_and_labelled_ones_are_known_to_both():
    (first, bank), (second, other) = both()
    assert sorted(torch.cat([first.samples, second.samples]).tolist()) == UNLABELLED.tolist()
    for owned, one in ((first, bank), (second, other)):
        assert one.pseudo_logits.shape == (4, 3)
        assert torch.equal(one.slots[owned.local[owned.samples]], torch.arange(4, dtype=torch.int32))
        assert torch.equal(-1 - one.slots[owned.local[LABELLED]].long(), LABELS[LABELLED])
        assert (owned.local >= 0).sum() == 4 + 3
    assert not set(first.samples.tolist()) & set(second.samples.tolist())


def test_samples_are_dealt_anew_at_a_prediction():
    parts = [both(prediction)[0][0].samples.tolist() for prediction in (0, 4, 0)]
    assert parts[0] == parts[2]
    assert set(parts[0]) != set(parts[1])


def test_hard_labels_and_confidence_of_all_samples(monkeypatch):
    monkeypatch.setattr(ownership, "_ROWS", 3)  # rows at a time
    pairs = both()
    labels, confidence = LABELS.clone(), torch.ones(len(LABELS))
    for owned, bank in pairs:
        labels[owned.samples] = bank.pseudo_logits.argmax(1)
        confidence[owned.samples] = bank.pseudo_logits.softmax(1).amax(1)
    # Each rank gives zeros for the samples of the other one.
    unlabelled = LABELS < 0
    assert torch.equal(sum(owned.hard_labels(bank) for owned, bank in pairs)[unlabelled], labels[unlabelled])
    assert torch.equal(sum(owned.confidence(bank) for owned, bank in pairs)[unlabelled], confidence[unlabelled])
    for owned, bank in pairs:
        assert torch.equal(owned.hard_labels(bank)[LABELLED], LABELS[LABELLED])
        assert torch.equal(owned.confidence(bank)[LABELLED], torch.ones(3))
