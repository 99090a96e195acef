"""Mixtures one after another: what was drawn stays drawn, each part has its shares, draws go on being counted."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.mixture import Mixture
from cpt.data.ramp import RampedMixture
from cpt.data.spliced import SplicedMixture


def test_half_replay_from_the_fourth_slot_on_by_hand():
    """A third of replay over four slots, then half: the second mixture begins anew there, its draws do not."""
    first, second = Mixture([Fraction(2), Fraction(1)]), Mixture([Fraction(1), Fraction(1)])
    mixture = SplicedMixture([(0, first), (4, second)])
    slots = np.arange(8)
    drawn = mixture.sources(slots).tolist()
    assert drawn[:4] == first.sources(slots[:4]).tolist() and drawn[4:] == second.sources(slots[:4]).tolist()
    assert [mixture.counts(n) for n in (4, 6, 8)] == [[3, 1], [4, 2], [5, 3]]
    draws = mixture.draws(slots).tolist()
    assert [draw for source, draw in zip(drawn, draws, strict=True) if source == 0] == [0, 1, 2, 3, 4]
    assert mixture.shares == second.shares


@st.composite
def parts(draw):
    """One to four parts over the same new sources, each with its share of replay."""
    shares = [Fraction(draw(st.integers(1, 9)), 10) for _ in range(draw(st.integers(1, 3)))]
    starts = sorted({0, *(draw(st.integers(1, 300)) for _ in range(draw(st.integers(0, 3))))})
    replayed = [Fraction(draw(st.integers(0, 999)), 1000) for _ in starts]
    whole = sum(shares)
    kinds = [draw(st.booleans()) for _ in starts]
    made = [
        RampedMixture(shares, share, share, 0) if is_ramped
        else Mixture([*(one / whole * (1 - share) for one in shares), share])
        for share, is_ramped in zip(replayed, kinds, strict=True)
    ]  # fmt: skip
    return list(zip(starts, made, strict=True))


@given(parts(), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_counts_and_draws_agree_with_the_sources_and_later_parts_change_nothing_before_them(made, first):
    mixture = SplicedMixture(made)
    slots = np.arange(first, first + 200)
    counts = np.array(mixture.counts(first))
    for source, draw in zip(mixture.sources(slots), mixture.draws(slots), strict=True):
        assert draw == counts[source]
        counts[source] += 1
    assert mixture.counts(first + 200) == counts.tolist()
    for number in range(1, len(made)):
        before = np.arange(made[number][0])
        earlier = SplicedMixture(made[:number])
        assert earlier.sources(before).tolist() == mixture.sources(before).tolist()
        assert earlier.draws(before).tolist() == mixture.draws(before).tolist()
        assert earlier.counts(len(before)) == mixture.counts(len(before))


def test_slots_need_not_come_in_order_nor_be_any():
    mixture = SplicedMixture([(0, Mixture([Fraction(1), Fraction(0)])), (3, Mixture([Fraction(0), Fraction(1)]))])
    assert mixture.sources(np.array([7, 0, 3, 2])).tolist() == [1, 0, 1, 0]
    assert mixture.draws(np.array([7, 0, 3, 2])).tolist() == [4, 0, 0, 2]
    assert mixture.sources(np.array([], dtype=np.int64)).tolist() == []
