"""Mixtures of the same sources one after another: shares that change while a stage is going on.

    slots   0 ............ s1 ............ s2 .....      what lies before a change is what it was without it
            first mixture   second          third        each begins anew; how often a source was drawn is counted on

In each part every source has its share as exactly as that part's mixture keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from cpt.data.mixture import Mixture
from cpt.data.ramp import RampedMixture


class SplicedMixture:
    """Has the methods of `Mixture`. `parts`: the first slot of each, ascending from 0, and its mixture."""

    def __init__(self, parts: Sequence[tuple[int, Mixture | RampedMixture]]) -> None:
        self._starts = np.array([start for start, _ in parts], dtype=np.int64)
        self._mixtures = [mixture for _, mixture in parts]
        before = [0] * len(self._mixtures[0].shares)
        self._before = [before]  # of each part: how often each source was drawn in those before it
        for (start, mixture), (end, _) in zip(parts[:-1], parts[1:], strict=True):
            before = [one + more for one, more in zip(before, mixture.counts(end - start), strict=True)]
            self._before.append(before)

    @property
    def shares(self) -> list[Fraction]:
        """Of each source in the last part."""
        return self._mixtures[-1].shares

    def sources(self, slots: np.ndarray) -> np.ndarray:
        """The source [n] that each of these slots [n] draws from."""
        return self._look_up(slots)[0]

    def draws(self, slots: np.ndarray) -> np.ndarray:
        """For each slot [n], the how-many-eth draw of its source it is, counted from 0."""
        return self._look_up(slots)[1]

    def counts(self, num_slots: int) -> list[int]:
        """How often each source is drawn in the first `num_slots` slots."""
        part = max(0, int(np.searchsorted(self._starts, num_slots, side="right")) - 1)
        here = self._mixtures[part].counts(num_slots - int(self._starts[part]))
        return [one + more for one, more in zip(self._before[part], here, strict=True)]

    def _look_up(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, draws = np.empty(len(slots), dtype=np.int64), np.empty(len(slots), dtype=np.int64)
        part_of = np.searchsorted(self._starts, slots, side="right") - 1
        for part in np.unique(part_of).tolist():
            at, mixture = part_of == part, self._mixtures[part]
            within = slots[at] - self._starts[part]
            sources[at] = mixture.sources(within)
            draws[at] = mixture.draws(within) + np.array(self._before[part], dtype=np.int64)[sources[at]]
        return sources, draws
