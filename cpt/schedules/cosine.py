"""Warm up from 0, then down half a cosine over the rest of the stage."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import Fault
from cpt.progress import Progress
from cpt.schedules._curves import half_cosine, line


@dataclass(frozen=True)
class Settings:
    """`peak`: highest rate. `floor`: rate at the stage's end. `warmup_tokens`: tokens of the stage on the way up."""

    peak: float
    floor: float = 0.0
    warmup_tokens: int = 0

    def faults(self) -> list[str]:
        """Rates in the wrong order, a negative warm-up."""
        faults = []
        if not (0 <= self.floor <= self.peak and self.peak > 0):
            faults.append(f"floor = {self.floor}, peak = {self.peak}: 0 <= floor <= peak, and peak above 0")
        return faults + ([] if self.warmup_tokens >= 0 else [f"warmup_tokens = {self.warmup_tokens}: at least 0"])


class Schedule:
    """From 0 to `peak` over the warm-up, half a cosine down to `floor` when the stage's tokens are spent, flat after.

    Raises Fault if the stage is not longer than its warm-up.
    Source: Ibrahim et al. 2024, arXiv:2403.08763.
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        if settings.warmup_tokens >= stage_tokens:
            raise Fault(
                f"schedule.warmup_tokens = {settings.warmup_tokens:,}: the stage has {stage_tokens:,} tokens; "
                "warm up over fewer"
            )
        self._settings, self._stage_tokens = settings, stage_tokens

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < settings.warmup_tokens:
            return line(0.0, settings.peak, tokens / settings.warmup_tokens)
        share = (tokens - settings.warmup_tokens) / (self._stage_tokens - settings.warmup_tokens)
        return half_cosine(settings.peak, settings.floor, min(1.0, share))
