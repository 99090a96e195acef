"""A shuffle without an index is a bijection, looks random, and never changes between versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.permutation import Permutation
from cpt.parallel.seeds import derive_seed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 10, 97, 100, 101, 1024, 4095, 4096, 4097, 9973, 100003])
@pytest.mark.parametrize("key", [0, 1, 2**63 - 1])
def test_every_number_stands_at_exactly_one_position(size, key):
    order = Permutation(size, key)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_it_is_a_bijection_for_any_size_and_key(size, key):
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=100, deadline=None)
def test_different_positions_of_a_large_order_hold_different_numbers_within_it(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    numbers = Permutation(size, key)(np.array(positions))
    assert numbers.min() >= 0
    assert numbers.max() < size
    assert len(set(numbers.tolist())) == len(positions)


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 2**62])
def test_the_ends_of_a_very_large_order_are_shuffled_too(size):
    ends = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    numbers = Permutation(size, 3)(ends)
    assert len(np.unique(numbers)) == len(ends)
    assert numbers.min() >= 0
    assert numbers.max() < size
    assert abs(numbers.astype(float).mean() / size - 0.5) < 5 / math.sqrt(12 * len(ends))


@pytest.mark.parametrize("size", [1, 2, 5, 7, 10, 1000, 2**40])
def test_a_position_holds_the_same_number_whether_asked_alone_or_in_any_batch(size):
    order = Permutation(size, 9)
    positions = np.arange(min(size, 50))
    together = order(positions)
    assert [int(order(position)) for position in positions.tolist()] == together.tolist()
    assert np.array_equal(order(positions[::-1]), together[::-1])
    assert np.array_equal(order(np.repeat(positions, 2)), np.repeat(together, 2))
    assert np.array_equal(Permutation(size, 9)(positions), together)


def test_asking_leaves_the_positions_as_they_were():
    positions = np.arange(10, dtype=np.uint64)
    Permutation(10, 1)(positions)
    assert np.array_equal(positions, np.arange(10))


def test_no_positions_hold_no_numbers():
    assert Permutation(5, 1)(np.array([], dtype=np.int64)).tolist() == []


def test_another_key_gives_another_order():
    orders = {tuple(Permutation(50, key)(np.arange(50)).tolist()) for key in range(200)}
    assert len(orders) == 200


def test_all_orders_of_three_things_occur_about_equally_often():
    orders = [tuple(Permutation(3, key)(np.arange(3)).tolist()) for key in range(3000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.all(np.abs(counts - 500) < 5 * math.sqrt(500))


@pytest.mark.parametrize("size", [2**17, 1_000_003, 10**9 + 7, 10**12 + 39])
@pytest.mark.parametrize("key", [0, 7])
def test_consecutive_positions_of_a_large_order_look_random(size, key):
    number = 2**16
    values = Permutation(size, key)(np.arange(size // 3, size // 3 + number)) / size
    # Five standard deviations of a uniform sample; without replacement it varies less.
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * number)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(number)
    counts = np.histogram(values, bins=256, range=(0, 1))[0]
    expected = number / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * math.sqrt(2 * 255)
    gaps = np.sort(values)[1:] - np.sort(values)[:-1]
    assert gaps.max() * number < 40  # about ln(number) if random; a hole would be far wider


def highest_chi_square(degrees: int) -> float:
    """What chi-square exceeds by chance once in a million times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.753 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(cells: np.ndarray, num_cells: int) -> float:
    """Of counts in so many cells, all expected alike."""
    counts = np.bincount(cells, minlength=num_cells)
    expected = len(cells) / num_cells
    return float(((counts - expected) ** 2 / expected).sum())


WHOLE = [(9973, 3), (2**14, 0), (65_537, 2**63), (100_003, 11), (1_000_003, 4)]


@pytest.mark.parametrize(("size", "key"), WHOLE)
def test_every_part_of_the_order_draws_from_every_part_of_the_things_alike(size, key):
    positions = np.arange(size)
    numbers = Permutation(size, key)(positions)
    cells = positions * 16 // size * 16 + numbers * 16 // size
    assert chi_square(cells, 256) < highest_chi_square(15 * 15)


@pytest.mark.parametrize(("size", "key"), WHOLE)
def test_things_are_displaced_by_any_distance_alike(size, key):
    positions = np.arange(size)
    distances = (Permutation(size, key)(positions) - positions) % size
    assert chi_square(distances * 64 // size, 64) < highest_chi_square(63)


@pytest.mark.parametrize("size", [10**6 + 3, 48_828_125, 10**12 + 39])
@pytest.mark.parametrize("distance", [1, 2, 7, 1000])
def test_what_stands_at_one_position_tells_nothing_of_another(size, distance):
    positions = np.arange(2**17)
    order = Permutation(size, 5)
    one, other = order(positions), order(positions + distance)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(positions))
    # Pairs that share no position: those that do are not independent of each other.
    apart = positions // distance % 2 == 0
    pairs = one[apart] * 16 // size * 16 + other[apart] * 16 // size
    assert chi_square(pairs, 256) < highest_chi_square(255)


@pytest.mark.parametrize("size", [2, 5, 7, 12])
def test_over_many_keys_every_position_of_a_small_order_holds_each_thing_alike(size):
    positions = np.arange(size)
    numbers = np.concatenate([Permutation(size, key)(positions) for key in range(2000)])
    cells = np.tile(positions, 2000) * size + numbers
    assert chi_square(cells, size * size) < highest_chi_square((size - 1) ** 2)


def test_epochs_have_orders_that_know_nothing_of_each_other():
    size, number = 1_000_003, 2**16
    positions = np.arange(number)
    epochs = [Permutation(size, derive_seed(17, "epoch", epoch))(positions) for epoch in range(8)]
    for epoch, one in enumerate(epochs):
        for other in epochs[:epoch]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(number)
            assert chi_square(one * 16 // size * 16 + other * 16 // size, 256) < highest_chi_square(255)
            assert (one == other).sum() < 10  # the same window at the same position: 0.07 expected


def test_neighbours_do_not_stay_neighbours():
    values = Permutation(10**9, 5)(np.arange(2**16))
    assert np.abs(np.diff(values)).min() > 0
    assert (np.abs(np.diff(values)) < 10**6).mean() < 0.01  # 0.2 % expected


def test_two_keys_give_unrelated_orders():
    one, other = (Permutation(10**9, key)(np.arange(2**16)).astype(float) for key in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 2**8


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_a_size_that_cannot_be_shuffled_is_an_error(size):
    with pytest.raises(ValueError, match=f"a permutation of {size} things: 1 to 2\\*\\*62 can be shuffled"):
        Permutation(size, 1)


@pytest.mark.parametrize("position", [5, 6, 2**40])
def test_a_position_outside_the_order_is_an_error(position):
    with pytest.raises(ValueError, match=f"position {position} in an order of 5"):
        Permutation(5, 1)(np.array([0, position]))


def test_a_negative_position_is_an_error():
    with pytest.raises(ValueError, match="in an order of 5"):
        Permutation(5, 1)(np.array([-1]))


GOLDEN = {
    (1, 0): [0],
    (2, 1): [1, 0],
    (10, 0): [1, 9, 2, 3, 7, 4, 8, 5, 0, 6],
    (10, 1): [9, 2, 5, 6, 1, 7, 3, 4, 0, 8],
    (97, 123456789): [93, 66, 68, 1, 20, 71, 42, 83, 50, 16],
    (100003, 9223372036854775807): [81628, 31827, 77515, 16150, 51193, 2665, 46732, 18518, 51756, 63197],
    (1000000000039, 42): [
        315369991148,
        107887105836,
        223240215451,
        862884508046,
        199408058753,
        661887258223,
        436896197596,
        806443672829,
        356338133813,
        829048087073,
    ],
}


@pytest.mark.parametrize(("size", "key"), list(GOLDEN))
def test_the_order_is_the_same_in_every_version(size, key):
    """Runs of the past depend on it: what a ledger says was consumed is said in these positions. Never change these."""
    assert Permutation(size, key)(np.arange(min(size, 10))).tolist() == GOLDEN[size, key]
