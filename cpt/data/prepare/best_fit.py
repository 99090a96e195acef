"""Best-fit-decreasing packing: pieces into bins of one size, the longest first, each where it leaves the least room.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
"""

from __future__ import annotations

from typing import final

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The bins, each the numbers of its pieces in ascending order, none longer than `capacity` together.

    lengths: of the pieces, [pieces], each from 1 to capacity. Time n log n + n log capacity; no chance is involved.
    """
    bins: list[list[int]] = []
    open_bins = _OpenBins(capacity)
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        number, room = open_bins.take(length) or (len(bins), capacity)
        if number == len(bins):
            bins.append([])
        bins[number].append(piece)
        if room > length:
            open_bins.add(number, room - length)
    return [sorted(pieces) for pieces in bins]


@final
class _OpenBins:
    """Bins by the room they have left; a tree counts them, so that the least room that will do is soon found."""

    def __init__(self, capacity: int) -> None:
        self._num_leaves = 1 << capacity.bit_length()
        # Node n has the children 2n and 2n + 1; the last half are the leaves, one for each room.
        self._counts = [0] * (2 * self._num_leaves)
        self._bins: dict[int, list[int]] = {}

    def add(self, number: int, room: int) -> None:
        """Opens a bin."""
        self._bins.setdefault(room, []).append(number)
        self._count(room, 1)

    def take(self, length: int) -> tuple[int, int] | None:
        """Number and room of a bin with the least room of at least `length`, which is then no longer open."""
        node = self._num_leaves + length
        if not self._counts[node]:
            while node > 1 and (node % 2 or not self._counts[node + 1]):
                node //= 2
            if node == 1:
                return None
            node += 1
            while node < self._num_leaves:
                node = 2 * node if self._counts[2 * node] else 2 * node + 1
        room = node - self._num_leaves
        self._count(room, -1)
        return self._bins[room].pop(), room

    def _count(self, room: int, change: int) -> None:
        node = self._num_leaves + room
        while node:
            self._counts[node] += change
            node //= 2
