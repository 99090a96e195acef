"""Warm up, then down as 1 / sqrt(tokens), which needs no end, and straight to the floor over the last tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import faults_of_rates, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`, `floor`: rates. `warmup`: share or tokens of the stage on the way up, of which the fall is a function.

    `cooldown`: share or tokens of the stage's end that go straight to the floor.
    """

    peak: float
    floor: float = 0.0
    warmup: Length = Length(share=Fraction(1, 100))
    cooldown: Length = Length()

    def faults(self) -> list[str]:
        """Rates in the wrong order, stretches that are none, no warm-up."""
        faults = faults_of_lengths(warmup=self.warmup, cooldown=self.cooldown) + faults_of_rates(self.floor, self.peak)
        if self.warmup == Length():
            faults.append("warmup = 0: the rate falls as sqrt(warmup / tokens); above 0")
        return faults


class Schedule:
    """A line up from 0, floor + (peak - floor) x sqrt(warmup / tokens), and a line down to `floor` at the stage's end.

    Raises Fault if warm-up and cool-down are together longer than the stage.
    Source: Li et al. 2025, arXiv:2504.02107 (TiC-LM).
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings, self._stage_tokens = settings, stage_tokens
        self._warmup, self._cooldown = room_for(stage_tokens, warmup=settings.warmup, cooldown=settings.cooldown)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        tokens, cooldown_from = progress.stage_tokens, self._stage_tokens - self._cooldown
        if tokens < self._warmup:
            return line(0.0, self._settings.peak, tokens / self._warmup)
        if tokens <= cooldown_from or not self._cooldown:
            return self._falling(tokens)
        share = min(1.0, (tokens - cooldown_from) / self._cooldown)
        return line(self._falling(cooldown_from), self._settings.floor, share)

    def _falling(self, tokens: float) -> float:
        floor = self._settings.floor
        return floor + (self._settings.peak - floor) * math.sqrt(self._warmup / tokens)
