"""Which source a slot draws from: shares exact to within one window over every prefix."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.mixture import LONGEST_PERIOD, Mixture


def assert_within_one_window(shares: list[Fraction], num_slots: int) -> None:
    """Of every prefix, in whole numbers: |count - share * n| < 1 for each source."""
    mixture = Mixture(shares)
    sources = mixture.sources(np.arange(num_slots))
    whole = sum(shares)
    for source, share in enumerate(share / whole for share in shares):
        counts = np.cumsum(sources == source)
        debts = np.arange(1, num_slots + 1) * share.numerator - counts * share.denominator
        assert np.abs(debts).max() < share.denominator, (shares, source)


@st.composite
def shares_of_sources(draw) -> list[Fraction]:
    denominator = draw(st.sampled_from([1, 2, 3, 7, 10, 12, 100, 997, 1000]) | st.integers(1, 1000))
    small_or_any = draw(st.sampled_from([1, 2, denominator]))
    numerators = draw(st.lists(st.integers(0, small_or_any) | st.integers(0, denominator), min_size=2, max_size=8))
    if not any(numerators):
        numerators[0] = 1
    return [Fraction(numerator, denominator) for numerator in numerators]


@given(shares_of_sources())
@settings(max_examples=150, deadline=None)
def test_every_prefix_has_each_share_to_within_one_window(shares):
    assert_within_one_window(shares, Mixture(shares).period + 3)


@pytest.mark.parametrize(
    "shares",
    [
        [1],
        [1, 0],
        [0, 1, 0, 0],
        [1, 1],
        [Fraction(1, 3)] * 3,
        [Fraction(3, 4), Fraction(1, 4)],
        [Fraction(1, 65536), Fraction(65535, 65536)],
        [Fraction(1, 9973), Fraction(9971, 9973), Fraction(1, 9973), 0],
        [Fraction(1, 1000)] * 7 + [Fraction(993, 1000)],
        [Fraction(655, 3410), Fraction(445, 3410), Fraction(381, 3410), Fraction(550, 3410), Fraction(182, 3410),
         Fraction(212, 3410), Fraction(384, 3410), Fraction(601, 3410)],
    ],
)  # fmt: skip
def test_the_bound_holds_for_tiny_equal_and_absent_shares(shares):
    assert_within_one_window([Fraction(share) for share in shares], 70_000)


def test_shares_that_differ_between_denominators_are_met():
    assert_within_one_window([Fraction(1, 7), Fraction(1, 11), Fraction(3, 13), Fraction(1, 5)], 40_000)


def test_a_source_without_a_share_is_never_drawn():
    assert set(Mixture([Fraction(1, 3), Fraction(0), Fraction(2, 3)]).sources(np.arange(1000)).tolist()) == {0, 2}


def test_shares_count_relative_to_their_sum():
    slots = np.arange(50)
    small, large = Mixture([Fraction(1, 10), Fraction(2, 10)]), Mixture([Fraction(5), Fraction(10)])
    assert small.shares == [Fraction(1, 3), Fraction(2, 3)]
    assert np.array_equal(small.sources(slots), large.sources(slots))


@given(shares_of_sources(), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_draws_are_the_running_count_of_their_source(shares, first):
    mixture = Mixture(shares)
    slots = np.arange(first, first + 200)
    sources, draws = mixture.sources(slots), mixture.draws(slots)
    seen = mixture.counts(first)
    for source, draw in zip(sources.tolist(), draws.tolist(), strict=True):
        assert draw == seen[source]
        seen[source] += 1
    assert mixture.counts(first + 200) == seen


@given(shares_of_sources(), st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_counts_are_the_histogram_of_the_slots_before(shares, num_slots):
    mixture = Mixture(shares)
    sources = mixture.sources(np.arange(num_slots))
    assert mixture.counts(num_slots) == np.bincount(sources, minlength=len(shares)).tolist()


@given(shares_of_sources())
@settings(max_examples=50, deadline=None)
def test_a_period_repeats_and_holds_each_share_exactly(shares):
    mixture = Mixture(shares)
    once = mixture.sources(np.arange(mixture.period))
    assert np.array_equal(mixture.sources(np.arange(7 * mixture.period, 8 * mixture.period)), once)
    assert mixture.counts(mixture.period) == [share * mixture.period for share in mixture.shares]


def test_a_slot_is_the_same_asked_alone_or_in_any_order():
    mixture = Mixture([Fraction(2, 7), Fraction(5, 7)])
    slots = np.array([10**12, 3, 3, 0])
    assert mixture.sources(slots).tolist() == [mixture.sources(np.array([slot]))[0] for slot in slots]
    assert mixture.draws(slots).tolist() == [mixture.draws(np.array([slot]))[0] for slot in slots]


def test_a_slot_far_out_costs_no_more_than_the_first():
    mixture = Mixture([Fraction(1, 3), Fraction(2, 3)])
    assert mixture.counts(3 * 10**15) == [10**15, 2 * 10**15]
    assert mixture.draws(np.array([3 * 10**15])).tolist() == [10**15 * [1, 2][mixture.sources(np.array([0]))[0]]]


def test_the_longest_period_is_made_in_a_moment():
    started = time.perf_counter()
    Mixture([Fraction(1, LONGEST_PERIOD)] * 7 + [Fraction(LONGEST_PERIOD - 7, LONGEST_PERIOD)])
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("shares", [[], [0], [0, 0], [1, -1, 1], [-1]])
def test_shares_that_are_negative_or_all_nothing_are_an_error(shares):
    with pytest.raises(ValueError, match="each at least 0, and not all of them 0"):
        Mixture([Fraction(share) for share in shares])


def test_shares_that_repeat_too_late_are_an_error_that_says_what_would_do():
    with pytest.raises(ValueError, match="repeat only after 100003 slots; write them with fewer digits"):
        Mixture([Fraction(1, 100_003), Fraction(100_002, 100_003)])


def test_the_pattern_is_the_same_in_every_version():
    """Runs of the past depend on it. Never change these."""
    pattern = Mixture([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]).sources(np.arange(12)).tolist()
    assert pattern == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    pattern = Mixture([Fraction(3, 4), Fraction(1, 4)]).sources(np.arange(8)).tolist()
    assert pattern == [0, 0, 1, 0, 0, 0, 1, 0]
