"""A replay share that moves in steps over the beginning of a stage: more, or less, replay while the shift is fresh.

share of replay   start |#
                        |###
                        |#####
                  share |###############     every step is a whole number of periods of its mixture, so that each
                        +--- ramp ---------> step begins with no source ahead of or behind its share
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cpt.data.mixture import LONGEST_PERIOD, Mixture

_NUM_STEPS = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Ramp:
    """The replay share goes from `start` to its own value over the first `tokens` of the stage, in up to 16 steps.

    `tokens` count replayed ones too. The share of each step is the ramp's mean over it; a step is rounded to whole
    periods of its mixture of sources.
    """

    start: Fraction
    tokens: int

    def faults(self) -> list[str]:
        """A share that leaves nothing new, no tokens."""
        faults = [] if 0 <= self.start < 1 else [f"start = {float(self.start)}: at least 0 and below 1"]
        return faults + ([] if self.tokens >= 1 else [f"tokens = {self.tokens}: at least 1; leave ramp out instead"])


class RampedMixture:
    """A `Mixture` of new sources and, last, replay, whose share moves from `start` to `replay_share`.

    `shares`: of the new sources, relative to their sum; `num_slots`: how long the ramp is. Has the methods of
    `Mixture`, and `shares` is what it comes to in the end. Raises ValueError as `Mixture` does.
    """

    def __init__(self, shares: Sequence[Fraction], start: Fraction, replay_share: Fraction, num_slots: int) -> None:
        of_steps, lengths = _steps(shares, start, replay_share, num_slots)
        self._mixtures = [Mixture(_with_replay(shares, share)) for share in [*of_steps, replay_share]]
        self._starts = np.cumsum([0, *lengths])  # first slot of each mixture
        counts = [mixture.counts(length) for mixture, length in zip(self._mixtures, lengths, strict=False)]
        self._before = np.cumsum([[0] * (len(shares) + 1), *counts], axis=0)  # draws of each source before a mixture
        self.shares = self._mixtures[-1].shares

    def sources(self, slots: np.ndarray) -> np.ndarray:
        """The source [n] that each of these slots [n] draws from."""
        return self._look_up(slots)[0]

    def draws(self, slots: np.ndarray) -> np.ndarray:
        """For each slot [n], the how-many-eth draw of its source it is, counted from 0."""
        return self._look_up(slots)[1]

    def counts(self, num_slots: int) -> list[int]:
        """How often each source is drawn in the first `num_slots` slots."""
        step = max(0, int(np.searchsorted(self._starts, num_slots, side="right")) - 1)
        within = self._mixtures[step].counts(num_slots - int(self._starts[step]))
        return [int(before) + number for before, number in zip(self._before[step], within, strict=True)]

    def _look_up(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = np.searchsorted(self._starts, slots, side="right") - 1
        sources, draws = np.empty_like(slots), np.empty_like(slots)
        for index in np.unique(step).tolist():
            at = step == index
            within = slots[at] - self._starts[index]
            sources[at] = self._mixtures[index].sources(within)
            draws[at] = self._mixtures[index].draws(within) + self._before[index][sources[at]]
        return sources, draws


def _steps(
    shares: Sequence[Fraction], start: Fraction, replay_share: Fraction, num_slots: int
) -> tuple[list[Fraction], list[int]]:
    """Replay share and length in slots of each step: as many steps as the periods of their mixtures leave room for."""
    for number in _NUM_STEPS:
        of_steps = [start + (replay_share - start) * Fraction(2 * step + 1, 2 * number) for step in range(number)]
        periods = [_period(_with_replay(shares, share)) for share in of_steps]
        if sum(periods) <= min(num_slots, LONGEST_PERIOD):
            break
    lengths: list[int] = []
    for step, period in enumerate(periods, start=1):
        missing = num_slots * step / len(of_steps) - sum(lengths)
        lengths.append(max(1, round(missing / period)) * period)
    return of_steps, lengths


def _with_replay(shares: Sequence[Fraction], replay_share: Fraction) -> list[Fraction]:
    whole = sum(shares, Fraction(0))
    return [share / whole * (1 - replay_share) for share in shares] + [replay_share]


def _period(shares: Sequence[Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares))
