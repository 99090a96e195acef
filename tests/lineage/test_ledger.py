"""What was consumed is kept as intervals, exactly, over any borders of epochs."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.lineage.ledger import Entry, Ledger, ShareChange, Skipped, Stop


def entry(num_windows: int = 10, **changes) -> Entry:
    return Entry(**{"source": "a", "corpus": "data/a", "fingerprint": "f", "sequence_length": 8, "seed": 3,
                    "num_windows": num_windows, **changes})  # fmt: skip


def test_nothing_is_consumed_at_first():
    assert entry().num_consumed == 0
    assert entry().intervals() == []


@pytest.mark.parametrize(
    ("draws", "epochs"),
    [
        ([(0, 4)], (((0, 4),),)),
        ([(0, 4), (4, 3)], (((0, 7),),)),
        ([(0, 10)], (((0, 10),),)),
        ([(0, 11)], (((0, 10),), ((0, 1),))),
        ([(7, 26)], (((7, 10),), ((0, 10),), ((0, 10),), ((0, 3),))),
        ([(10, 1)], ((), ((0, 1),))),
        ([(0, 2), (5, 2), (2, 3)], (((0, 7),),)),
        ([(0, 2), (5, 2)], (((0, 2), (5, 7)),)),
        ([(0, 5), (2, 1), (3, 4)], (((0, 7),),)),
        ([(0, 0)], ()),
    ],
)
def test_draws_become_joined_intervals_by_epoch(draws, epochs):
    after = entry()
    for first, number in draws:
        after = after.with_draws(first, number)
    assert after.epochs == epochs


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=6))
def test_intervals_hold_exactly_the_positions_drawn(num_windows, draws):
    after, drawn = entry(num_windows), set()
    for first, number in draws:
        after = after.with_draws(first, number)
        drawn |= {divmod(draw, num_windows) for draw in range(first, first + number)}
    held = [(epoch, at) for epoch, start, stop in after.intervals() for at in range(start, stop)]
    assert len(held) == len(set(held)) == after.num_consumed
    assert set(held) == drawn
    for intervals in after.epochs:
        assert all(one[1] < other[0] for one, other in zip(intervals, intervals[1:], strict=False))


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=8))
def test_drawing_in_portions_is_drawing_at_once(num_windows, portions):
    apart = entry(num_windows)
    for portion in portions:
        apart = apart.with_draws(apart.num_consumed, portion)
    assert apart == entry(num_windows).with_draws(0, sum(portions))


def test_drawing_leaves_the_entry_as_it_was():
    before = entry().with_draws(0, 3)
    before.with_draws(3, 5)
    assert before.num_consumed == 3


def test_an_entry_is_found_by_corpus_and_length_whatever_its_seed():
    ledger = Ledger((entry(seed=1), entry(fingerprint="g", seed=2), entry(sequence_length=16)))
    assert ledger.find("g", 8).seed == 2
    assert ledger.find("f", 16).sequence_length == 16
    assert ledger.find("h", 8) is None
    assert ledger.find("g", 16) is None


def test_an_entry_takes_the_place_of_the_one_with_its_key_or_comes_last():
    ledger = Ledger().with_entry(entry()).with_entry(entry(fingerprint="g"))
    again = ledger.with_entry(entry().with_draws(0, 5))
    assert [e.num_consumed for e in again.entries] == [5, 0]
    assert [e.num_consumed for e in ledger.entries] == [0, 0]
    assert [e.seed for e in ledger.with_entry(entry(seed=9)).entries] == [3, 3, 9]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 200), st.text(max_size=5)), max_size=4)
)
def test_a_ledger_survives_the_way_through_json(parts):
    entries = tuple(
        entry(number, seed=seed, fingerprint=str(index), source=name).with_draws(3, consumed)
        for index, (number, seed, consumed, name) in enumerate(parts)
    )
    ledger = Ledger(entries)
    assert Ledger.from_json(json.loads(json.dumps(ledger.as_json()))) == ledger


def test_the_json_says_in_words_what_was_consumed():
    assert Ledger((entry().with_draws(0, 12),)).as_json() == {
        "format_version": 1,
        "sources": [
            {
                "source": "a",
                "corpus": "data/a",
                "fingerprint": "f",
                "sequence_length": 8,
                "seed": 3,
                "windows_an_epoch": 10,
                "windows_consumed": 12,
                "windows_inherited": 0,
                "epochs": [[[0, 10]], [[0, 2]]],
            }
        ],
    }


CHANGES = (ShareChange("new", 96, Fraction(1, 3), "en", 0.25), ShareChange("new", 192, Fraction(1, 2), "en", math.inf))


def test_changes_of_replays_share_stay_with_the_ledger_and_survive_the_way_through_json():
    ledger = Ledger((entry(),), CHANGES)
    assert Ledger.from_json(json.loads(json.dumps(ledger.as_json(), allow_nan=False))) == ledger
    assert ledger.as_json()["share_changes"][0] == {
        "stage": "new", "window": 96, "share": "1/3", "source": "en", "forgetting": 0.25,
    }  # fmt: skip
    after = ledger.with_entry(entry().with_draws(0, 5)).with_entry(entry(seed=9)).as_inherited()
    assert after.share_changes == CHANGES and len(after.entries) == 2


STOPS = (Stop("new", 12, "en", 0.25, 0.1), Stop("new", 14, "en", math.inf, 0.1))


def test_what_stopped_runs_stays_with_the_ledger_and_survives_the_way_through_json():
    ledger = Ledger((entry(),)).with_stop(STOPS[0]).with_stop(STOPS[1])
    assert Ledger.from_json(json.loads(json.dumps(ledger.as_json(), allow_nan=False))) == ledger
    assert ledger.as_json()["stops"] == [
        {"stage": "new", "step": 12, "source": "en", "forgetting": 0.25, "above": 0.1},
        {"stage": "new", "step": 14, "source": "en", "forgetting": "inf", "above": 0.1},
    ]
    assert ledger.with_entry(entry(seed=9)).as_inherited().stops == STOPS


def test_a_stop_that_is_told_again_is_recorded_once():
    nan = Stop("new", 12, "en", math.nan, 0.1)
    ledger = Ledger().with_stop(STOPS[0]).with_stop(nan)
    assert ledger.with_stop(STOPS[0]) is ledger and ledger.with_stop(Stop("new", 12, "en", math.nan, 0.1)) is ledger


@pytest.mark.parametrize("plain", [{"sources": []}, {"format_version": 3, "sources": []}])
def test_a_ledger_of_another_release_is_a_fault(plain):
    with pytest.raises(Fault, match=r"a ledger of format_version (None|3): this release reads 1 and 2"):
        Ledger.from_json(plain)


def test_what_was_skipped_is_consumed_and_not_among_what_was_trained_on():
    entry = Entry("en", "data/en", "print", 8, 5, num_windows=10).with_draws(0, 14).with_skipped(3, 2)
    assert entry.intervals() == [(0, 0, 3), (0, 5, 10), (1, 0, 4)]
    assert (entry.num_consumed, entry.num_skipped) == (14, 2)
    over_the_end = entry.with_skipped(8, 4)
    assert over_the_end.intervals() == [(0, 0, 3), (0, 5, 8), (1, 2, 4)]
    assert over_the_end.with_skipped(8, 0) == over_the_end.with_skipped(9, -3) == over_the_end


def test_what_was_skipped_survives_the_way_through_json_and_a_child_knows_whose_it_is():
    entry = Entry("en", "data/en", "print", 8, 5, num_windows=10).with_draws(0, 14).with_skipped(8, 4)
    ledger = Ledger((entry,), skipped=(Skipped("prose", 96, 8, 13, "loss nan"),))
    told = json.loads(json.dumps(ledger.as_json()))
    assert told["format_version"] == 2 and told["sources"][0]["skipped"] == [[[8, 10]], [[0, 2]]]
    assert Ledger.from_json(told) == ledger
    (inherited,) = ledger.as_inherited().skipped
    assert inherited.is_inherited and (inherited.window, inherited.stop) == (96, 104)


def test_a_ledger_in_which_nothing_was_skipped_is_one_that_earlier_releases_read():
    told = Ledger((Entry("en", "data/en", "print", 8, 5, num_windows=10).with_draws(0, 3),)).as_json()
    assert told["format_version"] == 1 and "skipped" not in told and "skipped" not in told["sources"][0]
