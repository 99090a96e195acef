"""Warm-up, stable, decay: up, flat, and down over the last part of the stage; the flat part can be gone on from."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import CURVES, faults_of_rates, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`, `floor`: rates. `warmup`, `decay`: share or tokens of the stage. `shape` of the decay.

    `half_life` of an exponential decay, a share of the stage or tokens: the rate halves in it, and does not go below
    `floor`; left out, the decay takes the rate to the floor exactly.
    """

    peak: float
    floor: float = 0.0
    warmup: Length = Length(share=Fraction(1, 100))
    decay: Length = Length(share=Fraction(1, 10))
    shape: Literal["linear", "1-sqrt", "exponential"] = "1-sqrt"
    half_life: Length | None = None

    def faults(self) -> list[str]:
        """Rates in the wrong order, stretches that are none, an exponential way to nothing."""
        faults = faults_of_lengths(warmup=self.warmup, decay=self.decay) + faults_of_rates(self.floor, self.peak)
        if self.half_life is not None:
            faults += faults_of_lengths(half_life=self.half_life)
            if self.shape != "exponential":
                faults.append(f"half_life: shape = {self.shape} has none; use exponential, or leave it out")
            elif self.half_life == Length():
                faults.append("half_life = 0: above 0")
        elif self.shape == "exponential" and self.floor == 0:
            faults.append("floor = 0.0: an exponential decay never gets there; above 0, or tell half_life")
        return faults


class Schedule:
    """A line up from 0, flat at `peak`, down over the stage's last tokens.

    Raises Fault if warm-up and decay are together longer than the stage.
    Source: Hu et al. 2024, arXiv:2404.06395 (with half_life); shapes: Hägele et al. 2024, arXiv:2405.18392.
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings, self._stage_tokens = settings, stage_tokens
        self._warmup, self._decay = room_for(stage_tokens, warmup=settings.warmup, decay=settings.decay)
        self._half_life = settings.half_life and settings.half_life.tokens_of(stage_tokens)

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < self._warmup:
            return line(0.0, settings.peak, tokens / self._warmup)
        decayed = tokens - (self._stage_tokens - self._decay)
        if decayed <= 0 or not self._decay:
            return settings.peak
        if self._half_life:
            return max(settings.floor, settings.peak * 0.5 ** (min(decayed, self._decay) / self._half_life))
        return CURVES[settings.shape](settings.peak, settings.floor, min(1.0, decayed / self._decay))
