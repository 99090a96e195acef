"""Best-fit-decreasing packing fills bins as worked out by hand, and better than first-fit in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.prepare.best_fit import best_fit


def test_a_packing_is_the_one_worked_out_by_hand():
    # Longest first: 7 | 6 | 5 | 4 | then each where the least room is: 3 by the 5, 2 by the 6, 1 by the 7.
    lengths = np.array([2, 7, 1, 5, 6, 4, 3])
    assert best_fit(lengths, 8) == [[1, 2], [0, 4], [3, 6], [5]]


def test_pieces_of_a_whole_bin_are_alone():
    assert best_fit(np.array([5, 5, 5]), 5) == [[0], [1], [2]]


def test_nothing_makes_no_bins():
    assert best_fit(np.empty(0, np.int64), 5) == []


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=60))))
def test_every_piece_is_in_one_bin_and_no_two_bins_would_fit_into_one(drawn):
    capacity, lengths = drawn
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(piece for pieces in bins for piece in pieces) == list(range(len(lengths)))
    fill = sorted(sum(lengths[piece] for piece in pieces) for pieces in bins)
    assert all(0 < total <= capacity for total in fill)
    assert len(fill) < 2 or fill[0] + fill[1] > capacity


@given(st.integers(1, 30).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=40))))
def test_each_piece_goes_where_the_least_room_is(drawn):
    capacity, lengths = drawn
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(capacity - sum(lengths[piece] for piece in pieces) for pieces in bins) == sorted(rooms)


def test_fewer_bins_than_by_first_fit_in_order():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 1, 2000).astype(np.int64) + 1, 512)
    rooms: list[int] = []
    for length in lengths.tolist():
        index = next((index for index, room in enumerate(rooms) if room >= length), len(rooms))
        if index == len(rooms):
            rooms.append(512)
        rooms[index] -= length
    packed = best_fit(lengths, 512)
    assert len(packed) < len(rooms)
    assert len(packed) <= -(-int(lengths.sum()) // 512) + 1
