"""One learning rate all the way, after a straight warm-up from 0; also the main path of path switching."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import line


@dataclass(frozen=True)
class Settings:
    """`peak`: the rate. `warmup`: share or tokens of the stage spent on the way up."""

    peak: float
    warmup: Length = Length()

    def faults(self) -> list[str]:
        """A rate that is not positive, a warm-up that is no stretch of the stage."""
        faults = [] if self.peak > 0 else [f"peak = {self.peak}: above 0"]
        return faults + faults_of_lengths(warmup=self.warmup)


class Schedule:
    """Up in a straight line over the warm-up, then flat for ever."""

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings, self._warmup_tokens = settings, settings.warmup.tokens_of(stage_tokens)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        if progress.stage_tokens < self._warmup_tokens:
            return line(0.0, self._settings.peak, progress.stage_tokens / self._warmup_tokens)
        return self._settings.peak
