"""Random numbers of a sample: the definition in plain integers, their distribution, and that nothing else decides them."""

import pytest
import torch
from scipy.stats import chisquare

from r2d2fast.data.random_numbers import uniform
from tests.data.waiting import NeverWaits

SEEDS = [0, 1, 12345, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
DRAWS = [0, 1, 2, 99, 2**40 + 7, 2**63 - 1, -(2**63), -1, -2]


def mixed(z):
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def number(seed, draw, j):
    """The definition: number j = 0, 1, … of a draw, of 64-bit integers that wrap around."""
    key = mixed(mixed(seed + 0x9E3779B97F4A7C15) ^ draw % 2**64)
    return (mixed(key + (j + 1) * 0x9E3779B97F4A7C15) >> 40) / 2**24


def p_value(values, bins):
    """Of a chi-square test that ``values`` (float, in [0, 1)) are uniform."""
    return chisquare(torch.bincount((values.flatten() * bins).long(), minlength=bins).numpy()).pvalue


@pytest.mark.parametrize("seed", SEEDS)
def test_the_numbers_are_those_of_the_definition_in_python_integers(seed):
    expected = [[number(seed, draw, j) for j in range(6)] for draw in DRAWS]
    numbers = uniform(seed, torch.tensor(DRAWS), 6)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == expected


def test_they_are_the_same_in_every_version():
    """Written down: with other numbers a resumed run would make other augmentations than the one that was stopped."""
    found = uniform(7, torch.tensor([0, 5, -3]), 3) * 2**24
    assert found.tolist() == [[15941062, 14758698, 15118089], [9143652, 3339255, 1523044], [584331, 7639601, 2438322]]


def test_seeds_and_draws_wrap_around_at_64_bits():
    draws = torch.tensor(DRAWS)
    assert torch.equal(uniform(-1, draws, 2), uniform(2**64 - 1, draws, 2))
    assert torch.equal(uniform(3, draws, 2), uniform(3 + 2**64, draws, 2))
    assert not torch.equal(uniform(3, draws, 2), uniform(3 + 2**63, draws, 2))


def test_a_number_depends_neither_on_how_many_are_wanted_nor_on_the_other_draws():
    numbers = uniform(1, torch.arange(100), 5)
    assert torch.equal(uniform(1, torch.arange(100), 2), numbers[:, :2])
    assert torch.equal(uniform(1, torch.tensor([40, 3]), 5), numbers[[40, 3]])


def test_no_draw_and_no_number():
    assert uniform(0, torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)
    assert uniform(0, torch.arange(3), 0).shape == (3, 0)


@pytest.mark.parametrize("seed", [0, 1, -5])
@pytest.mark.parametrize("start", [0, 2**40, -30_000])
def test_each_number_is_uniform_in_0_to_1(seed, start):
    numbers = uniform(seed, torch.arange(start, start + 60_000), 5)
    assert 0 <= float(numbers.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers.max()) < 1
    assert min(p_value(column, 100) for column in numbers.unbind(1)) > 1e-3


def test_the_last_of_the_24_bits_is_even_as_often_as_odd():
    bits = (uniform(0, torch.arange(100_000), 1) * 2**24).long()
    for bit in range(24):
        assert abs(float((bits >> bit & 1).float().mean()) - 0.5) < 4 * 0.5 / 100_000**0.5


NUMBERS = uniform(0, torch.arange(60_001), 3)
PAIRS = {
    "two numbers of a draw": (NUMBERS[:, 0], NUMBERS[:, 1]),
    "a draw's last and the next one's first": (NUMBERS[:-1, 2], NUMBERS[1:, 0]),
    "neighbouring draws": (NUMBERS[:-1, 0], NUMBERS[1:, 0]),
    "neighbouring seeds": (NUMBERS[:, 0], uniform(1, torch.arange(60_001), 3)[:, 0]),
    "a draw and the same of the next epoch": (NUMBERS[:, 0], uniform(0, torch.arange(60_001) + 2**40, 3)[:, 0]),
    "opposite draws": (NUMBERS[1:, 0], uniform(0, -torch.arange(1, 60_001), 3)[:, 0]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_independent(pair):
    one, other = PAIRS[pair]
    joint = (one * 12).long() * 12 + (other * 12).long()
    assert chisquare(torch.bincount(joint, minlength=144).numpy()).pvalue > 1e-3


def test_different_draws_have_different_numbers():
    """Two numbers are 48 bits: 200 000 draws of two seeds share a pair with a chance of 1 in 3000."""
    pairs = torch.cat([uniform(seed, torch.arange(-50_000, 50_000), 2) for seed in (0, 1)])
    assert len(torch.unique(pairs, dim=0)) == 200_000


def test_the_device_is_not_waited_for():
    draws = torch.arange(10)
    with NeverWaits() as counted:
        uniform(2**63, draws, 5)
    assert counted.calls > 5


@pytest.mark.parametrize(
    "waiting",
    [
        lambda ones: ones.sum().item(),
        lambda ones: torch.tensor(3),
        lambda ones: ones[ones > 0],
        lambda ones: torch.where(ones > 0, ones, 2),
        lambda ones: ones.nonzero(),
    ],
    ids=["item", "tensor", "mask", "where", "nonzero"],
)
def test_the_guard_sees_what_waits(waiting):
    ones = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), NeverWaits():
        waiting(ones)
