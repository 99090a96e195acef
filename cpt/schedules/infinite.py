"""An infinite schedule: up, down to a rate at which training can go on for ever, and down at the end for a release.

    peak      /\\
             /  \\__________________________  constant: a later stage or run goes on from here, with no rise
            /                              \\
                                            \\  floor, over the stage's last tokens, if `anneal` is told

A stage that goes on at the constant rate has `warmup: 0` and `cooldown: 0`; one that makes a release of it has `anneal`
too, of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from cpt.config import Length, faults_of_lengths
from cpt.progress import Progress
from cpt.schedules._curves import exponential, half_cosine, inverse_root, line, room_for


@dataclass(frozen=True)
class Settings:
    """`peak`, `constant`, `floor`: rates. `warmup`, `cooldown`, `anneal`: share or tokens of the stage for each.

    `curve` of the way down to the constant rate; `steepness` of `inverse_sqrt`.
    """

    peak: float
    constant: float
    floor: float = 0.0
    warmup: Length = Length(share=Fraction(1, 100))
    cooldown: Length = Length(share=Fraction(6, 10))
    anneal: Length = Length()
    curve: Literal["cosine", "inverse_sqrt"] = "cosine"
    steepness: float = 10.0

    def faults(self) -> list[str]:
        """Rates in the wrong order, stretches that are none, an exponential way to nothing."""
        faults = faults_of_lengths(warmup=self.warmup, cooldown=self.cooldown, anneal=self.anneal)
        if not 0 <= self.floor <= self.constant <= self.peak or self.constant == 0:
            faults.append(
                f"floor = {self.floor}, constant = {self.constant}, peak = {self.peak}: 0 <= floor <= constant <= "
                "peak, and constant above 0"
            )
        elif self.floor == 0 and self.anneal != Length():
            faults.append("floor = 0.0: annealing is exponential and never gets there; above 0, such as constant / 10")
        return faults + ([] if self.steepness > 0 else [f"steepness = {self.steepness}: above 0"])


class Schedule:
    """A line up from 0, the cool-down curve, the constant rate, and an exponential down to `floor` at the stage's end.

    Raises Fault if the stretches are together longer than the stage.
    Source: Ibrahim et al. 2024, arXiv:2403.08763, section 7; constant x (floor / constant)^((t - Ts) / Ta).
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        self._settings = settings
        lengths = {"warmup": settings.warmup, "cooldown": settings.cooldown, "anneal": settings.anneal}
        self._warmup, self._cooldown, self._anneal = room_for(stage_tokens, **lengths)
        self._anneal_from = stage_tokens - self._anneal

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, tokens = self._settings, progress.stage_tokens
        if tokens < self._warmup:
            return line(0.0, settings.peak, tokens / self._warmup)
        if tokens < self._warmup + self._cooldown:
            share = (tokens - self._warmup) / self._cooldown
            if settings.curve == "cosine":
                return half_cosine(settings.peak, settings.constant, share)
            return inverse_root(settings.peak, settings.constant, share, settings.steepness)
        if tokens <= self._anneal_from or not self._anneal:
            return settings.constant
        return exponential(settings.constant, settings.floor, min(1.0, (tokens - self._anneal_from) / self._anneal))
