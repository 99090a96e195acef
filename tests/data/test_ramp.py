"""A replay share that moves over the beginning of a stage: exact over every prefix, as long as asked."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.mixture import Mixture
from cpt.data.ramp import RampedMixture
from cpt.data.replay import Ramp, Replay


def test_a_ramp_of_sixteen_slots_worked_by_hand():
    """From 1/2 to 0: after n slots n/2 - n^2/64 were replayed, 4 after 16, and none from there on."""
    mixture = RampedMixture([Fraction(1)], Fraction(1, 2), Fraction(0), 16)
    replayed = np.cumsum(mixture.sources(np.arange(40)) == 1)
    # n = 1, 2, ...: 0.48, 0.94, 1.36, 1.75, 2.11, 2.44, 2.73, 3, 3.23, 3.44, 3.61, 3.75, 3.86, 3.94, 3.98, 4
    assert replayed[:16].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert replayed[16:].tolist() == [4] * 24


@st.composite
def ramps(draw):
    shares = [Fraction(draw(st.integers(1, 999)), 1000) for _ in range(draw(st.integers(1, 4)))]
    start, end = (Fraction(draw(st.integers(0, 99)), 100) for _ in range(2))
    return shares, start, end, draw(st.integers(0, 3000))


def area(start: Fraction, end: Fraction, num_slots: int, number: int) -> Fraction:
    """Windows that should have been replayed among the first `number`."""
    on_ramp = min(number, num_slots)
    slope = (end - start) / (2 * num_slots) if num_slots else Fraction(0)
    return start * on_ramp + slope * on_ramp**2 + end * (number - on_ramp)


@given(ramps(), st.integers(0, 10**10))
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_its_share_of_replay_to_half_a_window_and_of_each_new_source_to_one(given_ramp, far):
    shares, start, end, num_slots = given_ramp
    mixture = RampedMixture(shares, start, end, num_slots)
    whole = sum(shares)
    for first in (0, num_slots - 20, num_slots + far):
        slots = np.arange(max(0, first), max(0, first) + 400)
        counts = np.array(mixture.counts(int(slots[0])))
        for slot, source, draw in zip(slots, mixture.sources(slots), mixture.draws(slots), strict=True):
            assert draw == counts[source]
            counts[source] += 1
            number = int(slot) + 1
            assert abs(counts[-1] - area(start, end, num_slots, number)) <= Fraction(1, 2)
            for count, share in zip(counts[:-1].tolist(), shares, strict=True):
                assert abs(count - share / whole * (number - int(counts[-1]))) < 1
        assert mixture.counts(int(slots[-1]) + 1) == counts.tolist()


def test_a_ramp_is_as_long_as_asked_whatever_the_shares():
    shares = [Fraction(125, 10), Fraction(301, 10), Fraction(88, 10)]
    mixture = RampedMixture(shares, Fraction(37, 100), Fraction(5, 100), 1000)
    assert mixture.counts(1000)[-1] == 210
    assert mixture.counts(11_000)[-1] == 710
    assert mixture.shares[-1] == Fraction(1, 20)


def test_making_a_ramp_over_a_billion_slots_ready_costs_nothing():
    mixture = RampedMixture([Fraction(1, 3), Fraction(2, 3)], Fraction(99, 100), Fraction(1, 100), 10**9)
    assert mixture.counts(10**9)[-1] == 5 * 10**8
    assert mixture.counts(5 * 10**8)[-1] == round(5 * 10**8 * 0.745)


def test_without_a_ramp_it_is_a_mixture_on_two_levels():
    flat = RampedMixture([Fraction(1), Fraction(1)], Fraction(1, 4), Fraction(1, 4), 0)
    joint = Mixture([Fraction(3, 8), Fraction(3, 8), Fraction(1, 4)])
    assert flat.counts(8000) == joint.counts(8000) == [3000, 3000, 2000]


@pytest.mark.parametrize(
    ("settings_of_replay", "tokens", "in_all"),
    [
        ({"share": Fraction(1, 4)}, 900, 900),
        ({"share": Fraction(1, 4), "accounting": "adds_to_new"}, 900, 1200),
        ({"share": Fraction(1, 4), "accounting": "adds_to_new"}, 901, 1202),
        # Over the ramp's 400 tokens 3/8 are replayed, 250 are new; the 650 that are left are 3/4 of 866.67.
        ({"share": Fraction(1, 4), "accounting": "adds_to_new", "ramp": Ramp(Fraction(1, 2), 400)}, 900, 400 + 867),
        ({"share": Fraction(1, 4), "ramp": Ramp(Fraction(1, 2), 400)}, 900, 900),
    ],
)
def test_the_tokens_of_a_stage_with_replay_on_top(settings_of_replay, tokens, in_all):
    assert Replay(**settings_of_replay).total_tokens(tokens) == in_all


@given(ramps(), st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_a_stage_with_a_ramp_on_top_has_as_many_new_windows_as_were_asked_for(given_ramp, num_new):
    shares, start, end, num_slots = given_ramp
    ramp = Ramp(start, max(1, num_slots))
    replay = Replay(end, accounting="adds_to_new", ramp=ramp)
    in_all = replay.total_tokens(num_new)  # windows of one token
    if in_all >= ramp.tokens:
        counts = RampedMixture(shares, start, end, ramp.tokens).counts(in_all)
        longest = ramp.tokens * (1 - (start + end) / 2)
        assert abs(sum(counts[:-1]) - max(num_new, longest)) <= 2
