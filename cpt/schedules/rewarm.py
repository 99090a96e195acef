"""Re-warm and re-decay: from where the parent's learning rate ended up to a peak again, then down half a cosine.

The usual recipe for new data: the peak is what lets the model learn, the slow rise spares it the shock.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from cpt.config import Fault
from cpt.progress import Progress
from cpt.schedules._curves import half_cosine, line


@dataclass(frozen=True)
class Settings:
    """`peak`: highest rate. `floor`: rate at the stage's end. `warmup`: share of the stage's tokens on the way up."""

    peak: float
    floor: float = 0.0
    warmup: Fraction = Fraction(1, 100)

    def faults(self) -> list[str]:
        """Rates in the wrong order, a warm-up that is no share."""
        faults = []
        if not (0 <= self.floor <= self.peak and self.peak > 0):
            faults.append(f"floor = {self.floor}, peak = {self.peak}: 0 <= floor <= peak, and peak above 0")
        if not 0 <= self.warmup < 1:
            faults.append(f"warmup = {float(self.warmup)}: a share of the stage, at least 0 and below 1")
        return faults


class Schedule:
    """Up in a straight line from the last rate before the stage, down half a cosine, flat after the stage's tokens.

    Source: Ibrahim et al. 2024, arXiv:2403.08763 (re-warming and re-decaying; 1 % of the tokens for the rise).
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        if stage_tokens < 1:
            raise Fault(f"a stage of {stage_tokens} tokens: at least 1")
        self._settings, self._stage_tokens, self._rate_before = settings, stage_tokens, rate_before
        self._warmup_tokens = float(settings.warmup * stage_tokens)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < self._warmup_tokens:
            return line(self._rate_before, settings.peak, tokens / self._warmup_tokens)
        share = (tokens - self._warmup_tokens) / (self._stage_tokens - self._warmup_tokens)
        return half_cosine(settings.peak, settings.floor, min(1.0, share))
