"""The two curves that most schedules are made of."""

from __future__ import annotations

import math


def line(start: float, end: float, share: float) -> float:
    """`share` of the way (0 to 1) from `start` to `end`, straight."""
    return start + (end - start) * share


def half_cosine(start: float, end: float, share: float) -> float:
    """`share` of the way (0 to 1) from `start` to `end`, along half a cosine: flat at both ends."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
