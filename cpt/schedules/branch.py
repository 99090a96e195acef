"""A branch off the main path: from the rate at which the path was left, completely down to `floor`, for a release.

Main path (`constant`): highest rate for ever, all new data. Branch: the whole stage is the way down. Training of the
next version goes on from the main path, as if nothing had happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import Fault
from cpt.progress import Progress
from cpt.schedules._curves import CURVES, Shape, room_for


@dataclass(frozen=True)
class Settings:
    """`floor`: rate at the branch's end. `shape` of the way down."""

    floor: float = 0.0
    shape: Shape = "cosine"

    def faults(self) -> list[str]:
        """A rate below nothing, an exponential way to nothing."""
        if self.floor < 0:
            return [f"floor = {self.floor}: at least 0"]
        if self.shape == "exponential" and self.floor == 0:
            return ["floor = 0.0: an exponential decay never gets there; above 0"]
        return []


class Schedule:
    """Down from the last rate before the stage to `floor` when the stage's tokens are spent, flat after.

    Raises Fault if there was no rate before, or one that is not above the floor.
    Source: Wang et al. 2024, arXiv:2410.04103 (learning-rate path switching).
    """

    def __init__(self, settings: Settings, stage_tokens: int, rate_before: float) -> None:
        if rate_before <= settings.floor:
            raise Fault(
                f"schedule.floor = {settings.floor:g}: the branch begins at {rate_before:g}, the last rate of the path "
                "it leaves, and goes down; leave a path that is higher"
            )
        room_for(stage_tokens)
        self._settings, self._stage_tokens, self._rate_before = settings, stage_tokens, rate_before

    def rate(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        settings, share = self._settings, min(1.0, progress.stage_tokens / self._stage_tokens)
        return CURVES[settings.shape](self._rate_before, settings.floor, share)
