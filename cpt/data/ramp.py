"""A replay share that moves over the beginning of a stage: more, or less, replay while the shift is fresh.

    share of replay   start |\\
                            |  \\
                      share |    `----------     replayed among the first n slots: the area below the line, rounded;
                            +-ramp-> slots       what is left goes to the new sources, by their own mixture

Two levels, each exact: of any prefix, replay has its share to within half a window, and each new source its share of
the new windows to within one. Nothing is stored but the mixture of the new sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cpt.data.mixture import Mixture


@dataclass(frozen=True)
class Ramp:
    """The replay share goes in a straight line from `start` to its own value over the first `tokens` of the stage.

    `tokens` count replayed ones too.
    """

    start: Fraction
    tokens: int

    def faults(self) -> list[str]:
        """A share that leaves nothing new, no tokens."""
        faults = [] if 0 <= self.start < 1 else [f"start = {float(self.start)}: at least 0 and below 1"]
        return faults + ([] if self.tokens >= 1 else [f"tokens = {self.tokens}: at least 1; leave ramp out instead"])


class RampedMixture:
    """A `Mixture` of new sources and, last, replay, whose share moves from `start` to `replay_share`.

    `shares`: of the new sources, relative to their sum; `num_slots`: how long the ramp is, 0 for none. Has the methods
    of `Mixture`, and `shares` is what it comes to in the end. Raises ValueError as `Mixture` does.
    """

    def __init__(self, shares: Sequence[Fraction], start: Fraction, replay_share: Fraction, num_slots: int) -> None:
        self._new = Mixture(shares)
        self._start, self._end, self._num_slots = start, replay_share, num_slots
        self._at_end = (start + replay_share) / 2 * num_slots  # replayed when the ramp ends, not rounded
        self.shares = [share * (1 - replay_share) for share in self._new.shares] + [replay_share]

    def sources(self, slots: np.ndarray) -> np.ndarray:
        """The source [n] that each of these slots [n] draws from."""
        return self._look_up(slots)[0]

    def draws(self, slots: np.ndarray) -> np.ndarray:
        """For each slot [n], the how-many-eth draw of its source it is, counted from 0."""
        return self._look_up(slots)[1]

    def counts(self, num_slots: int) -> list[int]:
        """How often each source is drawn in the first `num_slots` slots."""
        replayed = int(self._replayed(np.array([num_slots]))[0])
        return [*self._new.counts(num_slots - replayed), replayed]

    def _look_up(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = self._replayed(slots)
        is_new = self._replayed(slots + 1) == before
        sources, draws = np.full(len(slots), len(self._new.shares), dtype=np.int64), before.copy()
        of_new = (slots - before)[is_new]
        sources[is_new], draws[is_new] = self._new.sources(of_new), self._new.draws(of_new)
        return sources, draws

    def _replayed(self, numbers: np.ndarray) -> np.ndarray:
        """How many of the first n slots are replayed, for these n [n]."""
        on_ramp = np.minimum(numbers, self._num_slots)
        if not self._num_slots or int(on_ramp.min(initial=self._num_slots)) == self._num_slots:
            return _rounded(self._end, numbers - self._num_slots, self._at_end)
        # Whole numbers of any size: the square of a slot times the denominators of both shares exceeds 64 bits.
        exact = on_ramp.astype(object)
        slope = (self._end - self._start) / (2 * self._num_slots)
        scale = slope.denominator * self._start.denominator
        area = exact * exact * int(slope * scale) + exact * int(self._start * scale)
        replayed = ((2 * area + scale) // (2 * scale)).astype(np.int64)
        beyond = numbers > self._num_slots
        replayed[beyond] = _rounded(self._end, numbers[beyond] - self._num_slots, self._at_end)
        return replayed


def _rounded(share: Fraction, numbers: np.ndarray, offset: Fraction) -> np.ndarray:
    """offset + share x numbers, to the nearest whole number, halves up."""
    whole, part = divmod(offset + Fraction(1, 2), 1)
    scale = share.denominator * part.denominator
    # In turns of the share's denominator, so that products stay small however many slots there are.
    turns, within = np.divmod(numbers, share.denominator)
    inside = (within * (share.numerator * part.denominator) + int(part * scale)) // scale
    return int(whole) + turns * share.numerator + inside
