import torch

from r2d2fast.data import LabelledStream, mixed_batches, shuffled_batches

LABELLED = torch.arange(1000, 1050)
UNLABELLED = torch.arange(0, 400)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_shuffled_batches_are_one_pass_in_a_fresh_order():
    g = generator()
    first, second = (list(shuffled_batches(LABELLED, 20, g)) for _ in range(2))
    assert [len(batch) for batch in first] == [20, 20, 10]
    assert sorted(torch.cat(first).tolist()) == LABELLED.tolist()
    assert torch.cat(first).tolist() != LABELLED.tolist()
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_the_stream_shows_every_labelled_sample_equally_often_in_ever_new_orders():
    stream = LabelledStream(LABELLED, generator())
    drawn = torch.cat([stream.take(32) for _ in range(25)])
    passes = drawn.view(16, 50)
    assert all(sorted(one.tolist()) == LABELLED.tolist() for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 16


def test_the_stream_serves_more_than_it_has_at_once():
    drawn = LabelledStream(LABELLED, generator()).take(120)
    assert torch.bincount(drawn - 1000).tolist() != [3] * 40
    assert torch.bincount(drawn[:100] - 1000).tolist() == [2] * 50


def test_mixed_batches_are_96_unlabelled_then_32_labelled_and_pass_once_over_the_unlabelled():
    g = generator()
    stream = LabelledStream(LABELLED, g)
    batches = list(mixed_batches(UNLABELLED, stream, 96, 32, g))
    assert len(batches) == 400 // 96
    assert all(len(batch) == 128 for batch in batches)
    unlabelled = torch.cat([batch[:96] for batch in batches]).tolist()
    labelled = torch.cat([batch[96:] for batch in batches]).tolist()
    assert len(set(unlabelled)) == 4 * 96
    assert set(unlabelled) <= set(UNLABELLED.tolist())
    assert set(labelled) <= set(LABELLED.tolist())


def test_the_labelled_stream_runs_on_from_epoch_to_epoch():
    g = generator()
    stream = LabelledStream(LABELLED, g)
    epochs = [torch.cat(list(mixed_batches(UNLABELLED, stream, 96, 30, g))) for _ in range(5)]
    labelled = torch.cat([epoch[epoch >= 1000] for epoch in epochs])
    # 5 epochs of 4 · 30: twelve whole passes, which epochs that start anew would not give.
    assert torch.bincount(labelled - 1000).tolist() == [12] * 50
    assert all(sorted(one.tolist()) == LABELLED.tolist() for one in labelled.view(12, 50))


def test_samples_left_out_of_a_pass_differ_from_epoch_to_epoch():
    g = generator()
    stream = LabelledStream(LABELLED, g)
    seen = [set(torch.cat(list(mixed_batches(UNLABELLED, stream, 96, 32, g))).tolist()) for _ in range(2)]
    assert set(UNLABELLED.tolist()) - seen[0] != set(UNLABELLED.tolist()) - seen[1]
