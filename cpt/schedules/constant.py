"""One learning rate all the way, after a straight warm-up from 0."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.progress import Progress
from cpt.schedules._curves import line


@dataclass(frozen=True)
class Settings:
    """`peak`: the rate. `warmup_tokens`: tokens of the stage spent on the way up."""

    peak: float
    warmup_tokens: int = 0

    def faults(self) -> list[str]:
        """A rate that is not positive, a negative warm-up."""
        faults = [] if self.peak > 0 else [f"peak = {self.peak}: above 0"]
        return faults + ([] if self.warmup_tokens >= 0 else [f"warmup_tokens = {self.warmup_tokens}: at least 0"])


class Schedule:
    """Up in a straight line over the warm-up, then flat for ever."""

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings = settings

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < settings.warmup_tokens:
            return line(0.0, settings.peak, tokens / settings.warmup_tokens)
        return settings.peak
