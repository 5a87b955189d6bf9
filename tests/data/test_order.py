"""The order of the samples: passes and streams by their definitions, the same whatever came before and however ranks share it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from r2d2fast.data.order import BatchSampler, derive_seed, mixed_steps, shuffled_steps

LABELLED = torch.arange(1000, 1050)
UNLABELLED = torch.arange(0, 400)
PLACES = 2**40

RANKS = st.integers(1, 6)
EPOCHS = st.integers(0, 3)


def batches(labelled=50, unlabelled=400, seed=0, rank=0, ranks=1):
    return BatchSampler(torch.arange(1000, 1000 + labelled), torch.arange(unlabelled), seed, rank, ranks)


def everywhere(kind, ranks, *arguments, **sizes):
    """The steps of all ranks side by side: a list, by step, of lists, by rank, of (index, draws, total)."""
    return list(zip(*(kind(batches(rank=r, ranks=ranks, **sizes), *arguments) for r in range(ranks)), strict=True))


def joined(step, field):
    return torch.cat([part[field] for part in step])


# --- derive_seed -----------------------------------------------------------------------------------------------------------


def folded(*numbers):
    """The definition, of 64-bit integers that wrap around: SplitMix64's step and finalizer after each number."""
    z = 0
    for number in numbers:
        z = ((z ^ number) + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z = z ^ (z >> 31)
    return z // 2


NUMBERS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@given(NUMBERS)
def test_a_folded_seed_is_that_of_the_definition_and_one_that_torch_takes(numbers):
    seed = derive_seed(*numbers)
    assert seed == folded(*numbers)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_a_folded_seed_is_the_same_in_every_version():
    """Written down: with another one a resumed run would go on in another order than the one that was stopped."""
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1  # SplitMix64's first number, as its authors give it
    assert (derive_seed(1, 2, 3), derive_seed(2**62, 7)) == (7510213797696614745, 6725538626177122357)


@given(NUMBERS, NUMBERS)
def test_no_two_lists_of_numbers_fold_to_one_seed_by_accident(one, other):
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_small_numbers_fold_to_different_seeds_with_even_bits():
    seeds = [derive_seed(*numbers) for numbers in itertools.product(range(10), range(3), range(300))]
    assert len(set(seeds)) == 9000
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 4500) < 4.5 * 9000**0.5 / 2


# --- steps ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), RANKS)
def test_shuffled_steps_are_the_whole_batches_and_a_rest_that_has_two_samples_for_each_rank(samples, size, ranks):
    lengths = [len(range(samples)[start : start + size]) for start in range(0, samples, size)]
    steps = sum(length == size or length >= 2 * ranks for length in lengths)
    assert shuffled_steps(samples, size, ranks) == steps


@given(st.integers(0, 60), st.integers(1, 5), RANKS)
def test_mixed_steps_are_as_many_whole_batches_as_every_part_of_the_partition_has(unlabelled, each, ranks):
    parts = batches(unlabelled=unlabelled, ranks=ranks).partition(0)
    assert mixed_steps(unlabelled, each * ranks, ranks) == min(len(part) // each for part in parts)


# --- partition ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), RANKS, EPOCHS, st.integers(0, 2**62))
def test_a_partition_deals_out_every_unlabelled_sample_once_cut_as_torch_chunk_does(samples, ranks, prediction, seed):
    parts = batches(unlabelled=samples, seed=seed, ranks=ranks).partition(prediction)
    assert len(parts) == ranks
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(samples))
    chunk = -(-samples // ranks)
    assert [len(part) for part in parts] == [min(max(samples - rank * chunk, 0), chunk) for rank in range(ranks)]
    # The same order whatever the number of ranks, as a checkpoint that is loaded on another number of them needs it.
    assert torch.equal(order, batches(unlabelled=samples, seed=seed).partition(prediction)[0])


def test_a_partition_is_the_same_on_every_rank():
    for rank in range(3):
        parts = batches(rank=rank, ranks=3).partition(5)
        assert all(map(torch.equal, parts, batches(ranks=3).partition(5)))


def test_a_partition_is_new_with_each_prediction_and_seed():
    orders = [batches(seed=seed).partition(prediction)[0] for seed in range(5) for prediction in range(5)]
    assert len({tuple(order.tolist()) for order in orders}) == 25
    members = [frozenset(batches(ranks=2).partition(prediction)[0].tolist()) for prediction in range(5)]
    assert len(set(members)) == 5


# --- one shuffled pass ----------------------------------------------------------------------------------------------


def test_shuffled_batches_are_one_pass_in_an_order_of_its_own():
    first, second = (list(batches().shuffled(LABELLED, 20, epoch)) for epoch in (0, 1))
    assert [len(index) for index, _, _ in first] == [total for _, _, total in first] == [20, 20, 10]
    orders = [joined(steps, 0).tolist() for steps in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == LABELLED.tolist()
    assert orders[0] != LABELLED.tolist()
    assert orders[0] != orders[1]


@given(st.integers(0, 50), st.integers(1, 20), RANKS, EPOCHS, st.integers(0, 2**62))
def test_the_parts_of_all_ranks_make_up_the_global_batches_of_one(samples, size, ranks, epoch, seed):
    chosen = torch.arange(500, 500 + samples)
    whole = list(batches(seed=seed).shuffled(chosen, size, epoch))
    shared = everywhere(BatchSampler.shuffled, ranks, chosen, size, epoch, seed=seed)
    assert len(shared) == shuffled_steps(samples, size, ranks)
    for step, (index, draws, total) in zip(shared, whole, strict=False):  # one rank may have a small batch more
        assert torch.equal(joined(step, 0), index)
        assert torch.equal(joined(step, 1), draws)
        assert {part[2] for part in step} == {total} == {len(index)}
        sizes = [len(part[0]) for part in step]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("samples", "ranks", "sizes"),
    [(40, 1, [20, 20]), (41, 1, [20, 20]), (42, 1, [20, 20, 2]), (43, 2, [20, 20]), (44, 2, [20, 20, 4])],
)
def test_a_last_batch_of_less_than_two_samples_a_rank_is_left_out(samples, ranks, sizes):
    for rank in range(ranks):
        steps = batches(rank=rank, ranks=ranks).shuffled(torch.arange(samples), 20, 0)
        assert [total for _, _, total in steps] == sizes


def test_every_place_of_a_shuffled_order_is_as_likely_for_a_sample():
    places = [int(joined(list(batches().shuffled(torch.arange(6), 3, e)), 0).argmin()) for e in range(3000)]
    assert chisquare(torch.bincount(torch.tensor(places), minlength=6).numpy()).pvalue > 1e-3


def test_a_seed_makes_other_orders():
    orders = [joined(list(batches(seed=seed).shuffled(LABELLED, 20, 0)), 0).tolist() for seed in range(20)]
    assert len(set(map(tuple, orders))) == 20


def test_permutations_for_different_ends_differ():
    """Of the same samples, with the same numbers: the order of an epoch, of the stream, of the partition."""
    both = BatchSampler(LABELLED, LABELLED, 0)
    epoch = joined(list(both.shuffled(LABELLED, 50, 0)), 0)
    ((mixed, _, _),) = both.mixed((50, 50), 0, 0, 0)
    assert len({tuple(order.tolist()) for order in (epoch, mixed[50:], both.partition(0)[0])}) == 3


# --- mixed passes ---------------------------------------------------------------------------------------------------


def test_mixed_batches_are_96_unlabelled_then_32_labelled_and_pass_once_over_the_unlabelled():
    steps = list(batches().mixed((96, 32), 0, 0, 0))
    assert len(steps) == 400 // 96
    assert all(len(index) == len(draws) == total == 128 for index, draws, total in steps)
    unlabelled = torch.cat([index[:96] for index, _, _ in steps]).tolist()
    assert len(set(unlabelled)) == 4 * 96
    assert set(unlabelled) <= set(UNLABELLED.tolist())
    assert all(set(index[96:].tolist()) <= set(LABELLED.tolist()) for index, _, _ in steps)


def test_a_pass_has_its_own_order_and_leaves_out_samples_of_its_own():
    passes = [torch.cat([index[:96] for index, _, _ in batches().mixed((96, 32), e, e, 0)]) for e in range(4)]
    left_out = [frozenset(UNLABELLED.tolist()) - set(one.tolist()) for one in passes]
    assert len(set(left_out)) == 4
    assert not any(torch.equal(*pair) for pair in itertools.combinations(passes, 2))


def labelled_of(passes, sizes=(96, 32), epoch=0, ranks=1, **data):
    """The labelled samples of passes, in order, the ranks' parts of each batch one after the other."""
    steps = [everywhere(BatchSampler.mixed, ranks, sizes, epoch + p, p, 0, **data) for p in passes]
    few, mine = sizes[1] // ranks, sizes[0] // ranks
    parts = [index[mine:] for one in steps for step in one for index, _, _ in step]
    assert all(len(part) == few for part in parts)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("few", [2, 32, 50, 120])
def test_the_labelled_stream_runs_on_over_the_passes_and_shows_each_sample_equally_often(few):
    """25 passes of four batches: whole rounds of 50, which passes that start anew would not give."""
    stream = labelled_of(range(25), (96, few))
    rounds = stream.view(-1, 50)
    assert len(rounds) == 2 * few
    assert all(sorted(one.tolist()) == LABELLED.tolist() for one in rounds)
    assert len({tuple(one.tolist()) for one in rounds}) == 2 * few


@given(st.integers(1, 30), st.integers(20, 60), st.integers(1, 10), RANKS, st.integers(0, 2**62))
def test_the_ranks_make_up_the_stream_that_one_rank_takes(labelled, unlabelled, few, ranks, seed):
    """A prefix of it: uneven parts of the partition can make a pass of several ranks shorter."""
    data = {"labelled": labelled, "unlabelled": unlabelled, "seed": seed}
    shared = labelled_of(range(3), (2 * ranks, few * ranks), ranks=ranks, **data)
    whole = labelled_of(range(3), (2, few * ranks), **data)
    assert torch.equal(shared, whole[: len(shared)])


@given(st.integers(0, 5), st.integers(0, 9))
def test_a_pass_is_the_same_whatever_came_before_it_and_in_whichever_epoch_of_the_run(number, epoch):
    alone = labelled_of([number], epoch=epoch)
    assert torch.equal(alone, labelled_of(range(number + 1))[-len(alone) :])


@given(st.integers(1, 60), RANKS, st.integers(1, 4), st.integers(1, 3), EPOCHS, EPOCHS)
def test_each_rank_takes_unlabelled_samples_of_its_own_part_once(samples, ranks, mine, few, epoch, prediction):
    parts = batches(unlabelled=samples).partition(prediction)[0].chunk(ranks)
    steps = everywhere(BatchSampler.mixed, ranks, (mine * ranks, few * ranks), epoch, 1, prediction, unlabelled=samples)
    assert len(steps) == mixed_steps(samples, mine * ranks, ranks)
    for rank, part in enumerate(parts):
        taken = [sample for step in steps for sample in step[rank][0][:mine].tolist()]
        assert len(set(taken)) == len(taken) == mine * len(steps)
        assert set(taken) <= set(part.tolist())
    for step in steps:
        assert [total for _, _, total in step] == [(mine + few) * ranks] * ranks


# --- draws ----------------------------------------------------------------------------------------------------------


def test_the_draws_of_an_epoch_are_its_places_the_same_for_any_number_of_ranks():
    for ranks in (1, 2, 4):
        shuffled = everywhere(BatchSampler.shuffled, ranks, UNLABELLED, 96, 3)
        assert torch.equal(torch.cat([joined(step, 1) for step in shuffled]), 3 * PLACES + torch.arange(400))
        mixed = everywhere(BatchSampler.mixed, ranks, (96, 32), 3, 0, 0)
        assert len(mixed) == 4
        for number, step in enumerate(mixed):
            places = 3 * PLACES + 128 * number + torch.arange(128)
            assert sorted(joined(step, 1).tolist()) == places.tolist()
            # Unlabelled places first, of all ranks.
            mine = 96 // ranks
            assert sorted(torch.cat([draws[:mine] for _, draws, _ in step]).tolist()) == places[:96].tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_draw_occurs_twice_in_a_run(ranks):
    """Two epochs of each stage on all ranks."""
    steps = [everywhere(BatchSampler.shuffled, ranks, LABELLED, 20, epoch) for epoch in (0, 1)]
    steps += [everywhere(BatchSampler.mixed, ranks, (96, 32), epoch, epoch - 2, 2) for epoch in (2, 3)]
    steps += [
        everywhere(BatchSampler.shuffled, ranks, torch.cat([UNLABELLED, LABELLED]), 50, epoch) for epoch in (4, 5)
    ]
    draws = [draw for epoch in steps for step in epoch for draw in joined(step, 1).tolist()]
    assert len(draws) == 2 * (50 + 4 * 128 + 450)
    assert len(set(draws)) == len(draws)


def test_no_samples_make_no_batches():
    assert list(batches().shuffled(UNLABELLED[:0], 20, 0)) == []
    assert list(batches(unlabelled=0).mixed((96, 32), 0, 0, 0)) == []
    assert list(batches(unlabelled=95).mixed((96, 32), 0, 0, 0)) == []
