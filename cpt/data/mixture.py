"""Which source each slot of a stage draws from: shares exact to within one window over every prefix.

The shares are whole multiples of 1/period; the pattern of one period is made once, and repeats. So the n-th slot's
source, and how often each source was drawn before it, are table look-ups: memory depends on the shares and
never on how long the stage is.
Source: Tijdeman 1980, "The chairman assignment problem" (deviation at most 1 - 1/(2k - 2) for k sources).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 1 << 16


class Mixture:
    """Slots 0, 1, 2, ... divided over `len(shares)` sources; shares are taken relative to their sum.

    Raises ValueError if a share is negative, if all are zero, or if they need a period above 65,536 slots.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        whole = sum(shares, Fraction(0))
        if whole <= 0 or min(shares) < 0:
            raise ValueError(f"shares {[float(s) for s in shares]}: each at least 0, and not all of them 0")
        self.shares = [share / whole for share in shares]
        self.period = period_of(self.shares)
        if self.period > LONGEST_PERIOD:
            raise ValueError(
                f"shares {[float(s) for s in shares]} repeat only after {self.period} slots; "
                "write them with fewer digits"
            )
        quotas = [int(share * self.period) for share in self.shares]
        self._quotas = np.array(quotas, dtype=np.int64)  # draws of each source in one period
        self._pattern = _tijdeman(quotas, self.period)  # [period]
        self._rank = np.empty(self.period, dtype=np.int64)  # the how-many-eth draw of its source, in one period
        for source, quota in enumerate(quotas):
            self._rank[self._pattern == source] = np.arange(quota)

    def sources(self, slots: np.ndarray) -> np.ndarray:
        """The source [n] that each of these slots [n] draws from."""
        return self._pattern[slots % self.period]

    def draws(self, slots: np.ndarray) -> np.ndarray:
        """For each slot [n], the how-many-eth draw of its source it is, counted from 0."""
        turns, within = np.divmod(slots, self.period)
        return turns * self._quotas[self._pattern[within]] + self._rank[within]

    def counts(self, num_slots: int) -> list[int]:
        """How often each source is drawn in the first `num_slots` slots."""
        turns, within = divmod(num_slots, self.period)
        in_part = np.bincount(self._pattern[:within], minlength=len(self._quotas))
        return [int(number) for number in turns * self._quotas + in_part]


def period_of(shares: Sequence[Fraction]) -> int:
    """After how many slots shares, relative to their sum, are all met exactly for the first time."""
    whole = sum(shares, Fraction(0))
    return math.lcm(*((share / whole).denominator for share in shares))


def _tijdeman(quotas: list[int], period: int) -> np.ndarray:
    """The source of each slot of one period, in whole numbers: a source may be drawn once it is owed enough, and among
    those the one whose debt grows too large first is drawn."""
    num_sources = len(quotas)
    pattern = np.zeros(period, dtype=np.int64)
    drawn = [0] * num_sources
    slack = max(1, 2 * num_sources - 2)
    for slot in range(period):
        best, best_deadline = -1, math.inf
        for source, quota in enumerate(quotas):
            if quota and (quota * (slot + 1) - drawn[source] * period) * slack >= period:
                # First slot count at which the debt would reach 1 - 1/slack if this source is not drawn before.
                deadline = -((-(drawn[source] * slack + slack - 1) * period) // (quota * slack))
                if deadline < best_deadline:
                    best, best_deadline = source, deadline
        pattern[slot] = best
        drawn[best] += 1
    assert drawn == quotas, (drawn, quotas)
    return pattern
