"""Warm up from 0, then down half a cosine over the rest of the stage."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import faults_of_rates, half_cosine, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`: highest rate. `floor`: rate at the stage's end. `warmup`: share or tokens of the stage on the way up."""

    peak: float
    floor: float = 0.0
    warmup: Length = Length()

    def faults(self) -> list[str]:
        """Rates in the wrong order, a warm-up that is no stretch of the stage."""
        return faults_of_rates(self.floor, self.peak) + faults_of_lengths(warmup=self.warmup)


class Schedule:
    """From 0 to `peak` over the warm-up, half a cosine down to `floor` when the stage's tokens are spent, flat after.

    Raises Fault if the stage is shorter than its warm-up.
    Source: Ibrahim et al. 2024, arXiv:2403.08763.
    """

    curve = staticmethod(half_cosine)

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings, self._stage_tokens = settings, stage_tokens
        (self._warmup_tokens,) = room_for(stage_tokens, warmup=settings.warmup)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < self._warmup_tokens:
            return line(0.0, settings.peak, tokens / self._warmup_tokens)
        if tokens >= self._stage_tokens:
            return settings.floor
        share = (tokens - self._warmup_tokens) / (self._stage_tokens - self._warmup_tokens)
        return self.curve(settings.peak, settings.floor, share)
