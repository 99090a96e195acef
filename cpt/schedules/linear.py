"""Warm up from 0, then down in a straight line over the rest of the stage."""

from __future__ import annotations

from cpt.schedules import cosine
from cpt.schedules._curves import line


class Settings(cosine.Settings):
    """As a cosine's: `peak`, `floor` and `warmup`."""


class Schedule(cosine.Schedule):
    """From 0 to `peak` over the warm-up, straight down to `floor` when the stage's tokens are spent, flat after."""

    curve = staticmethod(line)
