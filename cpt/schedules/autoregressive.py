"""A cosine a round with ever lower peaks: as if one cosine had been drawn over all rounds so far, anew in each.

    round 0   /\\
             /  \\_ /\\_
                      \\_ /-\\__    peaks on the cosine over (round + 1) rounds, at the place where this one begins

For data that comes month by month, when nobody knows how many months there will be.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import faults_of_rates, half_cosine, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`: of the first round. `floor`: rate at the end of each. `warmup`: share or tokens on the way up in each.

    A stage is a round. `rounds_before`: those of the parents, before this run's first stage.
    """

    peak: float
    floor: float = 0.0
    warmup: Length = Length(share=Fraction(1, 100))
    rounds_before: int = 0

    def faults(self) -> list[str]:
        """Rates in the wrong order, a warm-up that is no stretch of the stage, fewer than no rounds."""
        faults = faults_of_rates(self.floor, self.peak) + faults_of_lengths(warmup=self.warmup)
        return faults + ([] if self.rounds_before >= 0 else [f"rounds_before = {self.rounds_before}: at least 0"])


class Schedule:
    """In round i: a line up from 0 to the global cosine's value at i / (i + 1) of its way, half a cosine to `floor`.

    Raises Fault if the stage is shorter than its warm-up.
    Source: Li et al. 2025, arXiv:2504.02107 (TiC-LM's autoregressive meta-schedule); rounds of equal length.
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings, self._stage_tokens = settings, stage_tokens
        (self._warmup_tokens,) = room_for(stage_tokens, warmup=settings.warmup)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        num_before = settings.rounds_before + progress.stage
        peak = half_cosine(settings.peak, settings.floor, num_before / (num_before + 1))
        if tokens < self._warmup_tokens:
            return line(0.0, peak, tokens / self._warmup_tokens)
        if tokens >= self._stage_tokens:
            return settings.floor
        share = (tokens - self._warmup_tokens) / (self._stage_tokens - self._warmup_tokens)
        return half_cosine(peak, settings.floor, share)
