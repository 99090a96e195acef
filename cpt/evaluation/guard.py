"""Stops a run that forgets too much: `stop_if: {forgetting: {source: en, above: 0.1}}`, asked after each evaluation.

What a source has forgotten is how far its loss lies above its best so far, over the run and all its parents: the same
number as in the score matrix (cpt/evaluation/forgetting.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cpt.evaluation.forgetting import best, forgetting, last
from cpt.evaluation.history import History


@dataclass(frozen=True)
class Limit:
    """How much of a held-out source may be forgotten, in nats a token."""

    source: str
    above: float

    def faults(self) -> list[str]:
        """A limit that every evaluation would exceed, or none could."""
        fine = 0 <= self.above < math.inf
        return [] if fine else [f"above = {self.above:g}: a number of nats, at least 0"]


@dataclass(frozen=True)
class Settings:
    """`forgetting`: one limit or several; the first that is exceeded stops the run."""

    forgetting: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Why a run stops: `source` has lost `forgetting` nats a token, its loss is `loss` and was `best`."""

    source: str
    forgetting: float
    above: float
    best: float | None
    loss: float

    def as_line(self, step: int) -> str:
        """For the user, who decides how to go on."""
        lowest = "never a number" if self.best is None else f"{self.best:.4f}"
        return (
            f"stopped after step {step}, which is saved: {self.source} has lost {self.forgetting:.4f} nats a token, "
            f"stop_if.forgetting allows {self.above:g} (best so far {lowest}, now {self.loss:.4f}). The same command "
            "with a higher limit, or without one, goes on from there; a child of an earlier step can replay more"
        )

    def as_json(self) -> dict[str, Any]:
        """For a note in the run folder; what is no finite number as text."""
        return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in vars(self).items()}


def verdict_after(settings: Settings, history: History, step: int) -> Verdict | None:
    """Why the run that `history` ends with stops, if it was evaluated at `step` and a limit is exceeded; else None.

    A loss that is not a number exceeds every limit.
    """
    if not history.stages or history.rows[-1].step != step:
        return None
    for limit in settings.forgetting:
        losses = history.column(limit.source)
        lost = forgetting(losses)
        if losses[-1] is not None and not lost <= limit.above:
            return Verdict(limit.source, lost, limit.above, best(losses), last(losses))
    return None
