"""Re-warm and re-decay: from where the parent's learning rate ended up to a peak again, then down half a cosine.

The usual recipe for new data: the peak is what lets the model learn, the slow rise spares it the shock. Others found no
rise at all the better: `rewarm: none` goes down from where the parent's rate ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from cpt.config import Fault, Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import faults_of_rates, half_cosine, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`: rate that the model was trained with at its highest. `floor`: rate at the stage's end. `warmup`: share or
    tokens of the stage on the way up. `rewarm`: how high: to the `peak`, to a share of it, or `none`, not at all.
    """

    peak: float | None = None
    floor: float = 0.0
    warmup: Length = Length(share=Fraction(1, 100))
    rewarm: Literal["none", "peak"] | Fraction = "peak"

    def faults(self) -> list[str]:
        """No peak to rise to, rates in the wrong order, a warm-up that is no stretch of the stage."""
        faults = faults_of_lengths(warmup=self.warmup)
        if isinstance(self.rewarm, Fraction) and not 0 < self.rewarm <= 1:
            faults.append(f"rewarm = {float(self.rewarm)}: none, peak, or a share of the peak, above 0 and at most 1")
        elif self.top is not None:
            faults += faults_of_rates(self.floor, self.top)
        elif self.rewarm != "none":
            faults.append("peak is not set: the rate to rise to; or rewarm: none, to go down from the last one")
        return faults

    @property
    def top(self) -> float | None:
        """The rate to rise to; None: no rise, or not told."""
        if self.rewarm == "none" or self.peak is None:
            return None
        return self.peak if self.rewarm == "peak" else self.peak * float(self.rewarm)


class Schedule:
    """Up in a straight line from the last rate before the stage, down half a cosine, flat after the stage's tokens.

    Raises Fault without a rise if there was no rate before, or one below the floor.
    Source: Ibrahim et al. 2024, arXiv:2403.08763 (re-warming and re-decaying; 1 % of the tokens for the rise);
    Parmar et al. 2024, arXiv:2407.07263 (no rise).
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        if settings.top is None and not 0 < settings.floor <= rate_before and not (settings.floor == 0 < rate_before):
            raise Fault(
                f"schedule.rewarm = none: the last rate before is {rate_before:g}, to go down to {settings.floor:g} "
                "from; continue a parent that ended higher, or re-warm to a peak"
            )
        self._settings, self._stage_tokens, self._rate_before = settings, stage_tokens, rate_before
        self._top = rate_before if settings.top is None else settings.top
        (self._warmup_tokens,) = room_for(stage_tokens, warmup=Length() if settings.top is None else settings.warmup)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        tokens = progress.stage_tokens
        if tokens < self._warmup_tokens:
            return line(self._rate_before, self._top, tokens / self._warmup_tokens)
        if tokens >= self._stage_tokens:
            return self._settings.floor
        share = (tokens - self._warmup_tokens) / (self._stage_tokens - self._warmup_tokens)
        return half_cosine(self._top, self._settings.floor, share)
