"""Equal chains, equal windows in equal order; nothing else counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpt.lineage.chain import START, lengthen

WINDOWS = st.lists(st.tuples(st.text("abc:0", max_size=3), st.integers(0, 30), st.integers(1, 30)), max_size=12)


@given(WINDOWS, st.lists(st.integers(0, 12), max_size=4))
def test_it_does_not_matter_how_windows_are_grouped_into_steps(windows, cuts):
    borders = [0, *sorted(min(cut, len(windows)) for cut in cuts), len(windows)]
    chain = START
    for start, stop in zip(borders, borders[1:], strict=False):
        chain = lengthen(chain, windows[start:stop])
    assert chain == lengthen(START, windows)


@given(WINDOWS, WINDOWS)
def test_other_windows_make_another_chain(one, other):
    assert (lengthen(START, one) == lengthen(START, other)) == (one == other)


def test_every_part_of_every_window_counts():
    windows = [("a", 1, 9), ("b", 2, 9), ("a", 3, 9)]
    changed = [
        [("a", 1, 9), ("b", 2, 9), ("a", 4, 9)],
        [("a", 1, 9), ("b", 2, 9), ("c", 3, 9)],
        [("a", 1, 8), ("b", 2, 9), ("a", 3, 9)],
        [("b", 2, 9), ("a", 1, 9), ("a", 3, 9)],
        [("a", 1, 9), ("b", 2, 9)],
        [("a", 1, 9), ("b", 2, 9), ("a", 3, 9), ("a", 3, 9)],
        [],
    ]
    chains = [lengthen(START, each) for each in [windows, *changed]]
    assert len(set(chains)) == len(chains)


def test_a_chain_from_another_start_is_another():
    assert lengthen(START, [("a", 1, 9)]) != lengthen("1" * 32, [("a", 1, 9)])


def test_no_windows_leave_the_chain_as_it_is():
    assert lengthen(START, []) == START


def test_the_chain_is_the_same_in_every_version():
    """`cpt verify-order` compares runs of different versions. Never change this."""
    assert (
        lengthen(START, [("0123456789abcdef", 0, 9), ("0123456789abcdef", 8, 9)]) == "15bc27e6e06c01e397fa2cf2a85f4d37"
    )
