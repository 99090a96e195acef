"""The two areas under learning rates, added up step by step, are the sums that the laws are written with."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.checkpoint import Place
from cpt.lineage.areas import Areas


def areas_of(rates: list[float], before: float | None = None) -> Areas:
    areas = Areas(rate=before)
    for rate in rates:
        areas = areas.after_step(rate)
    return areas


def written_out(rates: list[float], before: float) -> tuple[float, float]:
    all_rates = [before, *rates]
    falls = [one - other for one, other in zip(all_rates, all_rates[1:], strict=False)]
    inner = [math.fsum(falls[k] * 0.999 ** (i - k) for k in range(i + 1)) for i in range(len(rates))]
    return math.fsum(rates), math.fsum(inner)


def test_three_steps_by_hand():
    # Falls of 1, 0 and 2; inner sums 1, 0.999 and 0.998001 + 2.
    areas = areas_of([3.0, 3.0, 1.0], before=4.0)
    assert areas.forward == 7.0
    assert areas.annealing == pytest.approx(1 + 0.999 + 2.998001, abs=1e-12)


@given(st.lists(st.floats(0, 1e-2), min_size=1, max_size=200), st.floats(0, 1e-2))
def test_they_are_the_double_sums(rates, before):
    areas, expected = areas_of(rates, before), written_out(rates, before)
    assert (areas.forward, areas.annealing) == pytest.approx(expected, abs=1e-13)


def test_a_first_step_without_a_parent_falls_from_nowhere():
    assert areas_of([1e-3, 1e-3]) == Areas(2e-3, 0.0, 0.0, 1e-3)


def test_taken_up_again_they_go_on_to_the_bit_and_a_child_begins_its_own():
    place = Place()
    for rate in (1e-3, 7e-4, 3e-4):
        place = place.after_step(96, rate, "x")
    again = Place.from_json(place.as_json(place.ledger_before_stage))
    assert again == place
    child = Place.of_child(place.as_json(place.ledger_before_stage))
    assert child.areas == Areas(rate=3e-4)


def test_a_checkpoint_of_an_earlier_version_has_none():
    state = Place().after_step(96, 1e-3, "x").as_json(Place().ledger_before_stage)
    del state["areas"]
    assert Place.from_json(state) == dataclasses.replace(Place.from_json(state), areas=Areas())
