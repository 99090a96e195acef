"""The curves that schedules are made of, and what their settings have in common.

`share`: how far along the curve, from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from cpt.config import Fault, Length

Shape = Literal["linear", "cosine", "1-sqrt", "exponential"]


def line(start: float, end: float, share: float) -> float:
    """From `start` to `end`, straight."""
    return start + (end - start) * share


def half_cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine: flat at both ends."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def one_minus_root(start: float, end: float, share: float) -> float:
    """From `start` to `end` as 1 - sqrt(share) falls: steep at first. Source: Hägele et al. 2024, arXiv:2405.18392."""
    return end + (start - end) * (1.0 - math.sqrt(share))


def exponential(start: float, end: float, share: float) -> float:
    """From `start` to `end`, both above 0, by the same factor in equal stretches."""
    return start * (end / start) ** share


def inverse_root(start: float, end: float, share: float, steepness: float) -> float:
    """From `start` to `end` as h(share) = 1 / sqrt(1 + steepness x share) - 1 falls from 0 to h(1)."""
    return start + (end - start) * (1 / math.sqrt(1 + steepness * share) - 1) / (1 / math.sqrt(1 + steepness) - 1)


CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": line,
    "cosine": half_cosine,
    "1-sqrt": one_minus_root,
    "exponential": exponential,
}


def faults_of_rates(floor: float, peak: float) -> list[str]:
    """Rates in the wrong order."""
    if 0 <= floor <= peak and peak > 0:
        return []
    return [f"floor = {floor}, peak = {peak}: 0 <= floor <= peak, and peak above 0"]


def room_for(stage_tokens: int, **lengths: Length) -> list[float]:
    """The lengths in tokens. Raises Fault if together they are longer than the stage, or if the stage has no tokens."""
    if stage_tokens < 1:
        raise Fault(f"a stage of {stage_tokens} tokens: at least 1")
    tokens = [length.tokens_of(stage_tokens) for length in lengths.values()]
    if sum(tokens) > stage_tokens:
        told = " + ".join(f"schedule.{name} = {length.plain}" for name, length in lengths.items() if length != Length())
        raise Fault(f"{told}: {sum(tokens):,.0f} tokens, the stage has {stage_tokens:,}; make them shorter")
    return tokens
