"""A replay share that moves over the beginning of a stage: each step of the stairs exact, all of them together too."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.ramp import RampedMixture
from cpt.data.replay import Ramp, Replay


def test_a_ramp_of_eight_steps_worked_by_hand():
    """From 0 to 1/2 over 512 slots: the periods of 16 steps (64 or 32 slots each) would not fit, those of 8 do."""
    mixture = RampedMixture([Fraction(1)], Fraction(0), Fraction(1, 2), 512)
    is_replay = mixture.sources(np.arange(1024)) == 1
    of_steps = is_replay[:512].reshape(8, 64).sum(axis=1)
    assert of_steps.tolist() == [2, 6, 10, 14, 18, 22, 26, 30]  # 1/32, 3/32, ... of 64
    assert is_replay[512:].sum() == 256


@st.composite
def ramps(draw):
    shares = [Fraction(draw(st.integers(1, 10)), 10) for _ in range(draw(st.integers(1, 4)))]
    start, end = (Fraction(draw(st.integers(0, 9)), 10) for _ in range(2))
    return shares, start, end, draw(st.integers(1, 20_000))


@given(ramps())
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_the_share_of_its_steps_to_within_one_window(given_ramp):
    shares, start, end, num_slots = given_ramp
    mixture = RampedMixture(shares, start, end, num_slots)
    slots = np.arange(int(mixture._starts[-1]) + 300)
    step = np.searchsorted(mixture._starts, slots, side="right") - 1
    sources, draws = mixture.sources(slots), mixture.draws(slots)
    asked_of_step = np.array([[float(share) for share in of_step.shares] for of_step in mixture._mixtures])
    for source in range(len(shares) + 1):
        drawn = np.cumsum(sources == source)
        asked = np.cumsum(asked_of_step[step, source])
        assert np.abs(drawn - asked).max() < 1 + 1e-6
        assert draws[sources == source].tolist() == list(range(drawn[-1]))
    for number in (0, 1, len(slots) // 2, len(slots)):
        assert mixture.counts(number) == np.bincount(sources[:number], minlength=len(shares) + 1).tolist()


@given(ramps())
@settings(max_examples=60, deadline=None)
def test_the_share_moves_one_way_from_start_to_end(given_ramp):
    shares, start, end, num_slots = given_ramp
    mixture = RampedMixture(shares, start, end, num_slots)
    of_steps = [of_step.shares[-1] for of_step in mixture._mixtures]
    assert of_steps == sorted(of_steps, reverse=start > end)
    assert of_steps[-1] == mixture.shares[-1] == end
    assert all(min(start, end) <= share <= max(start, end) for share in of_steps)
    whole = sum(shares)
    assert mixture.shares[:-1] == [share / whole * (1 - end) for share in shares]


def test_a_long_ramp_is_as_long_as_asked():
    mixture = RampedMixture([Fraction(1)], Fraction(0), Fraction(1, 4), 100_000)
    assert abs(int(mixture._starts[-1]) - 100_000) < 16 * 128


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
