"""Raises replay's share while too much is forgotten, and lowers it again: asked after each evaluation of a stage.

    share := share + gain * (forgetting - above)      not below the stage's own share, not above `at_most`

Share less the stage's own is the multiplier of a constraint "forgetting is at most `above`", moved by projected dual
ascent on held-out loss; of several constraints the one that is violated most counts. What a source has forgotten is
what the score matrix and `stop_if` say. Shares are whole thousandths, so that ranks and resumes that differ in the last
digits of a loss agree.
Source: Arrow, Hurwicz and Uzawa 1958, Studies in Linear and Non-Linear Programming (gradient method for a saddle point:
multipliers go up with the violation of their constraint, and not below 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from cpt.evaluation.forgetting import forgetting
from cpt.evaluation.guard import Limit
from cpt.evaluation.history import History

_STEPS = 1000  # a share is so many steps


@dataclass(frozen=True)
class Settings:
    """`forgetting`: one limit or several; none, and nothing is raised. `gain`: share a nat. `at_most`: of replay."""

    forgetting: tuple[Limit, ...] = ()
    gain: float = 1.0
    at_most: Fraction = Fraction(1, 2)

    def faults(self) -> list[str]:
        """A share that never moves, or leaves nothing new."""
        faults = []
        if not 0 < self.gain < math.inf:
            faults.append(f"gain = {self.gain:g}: above 0; the share rises by gain x nats above the limit")
        if not 0 < self.at_most < 1:
            faults.append(f"at_most = {float(self.at_most):g}: above 0 and below 1, such as 50%")
        return faults


@dataclass(frozen=True)
class Raised:
    """What replay's share becomes, and the source that decided it."""

    share: Fraction
    source: str
    forgetting: float

    def as_line(self, stage: str, window: int) -> str:
        """For the log."""
        return (
            f"replay's share in stage {stage} goes to {float(100 * self.share):.4g}% from window {window} on: "
            f"{self.source} has lost {self.forgetting:.4f} nats a token"
        )


def share_after(settings: Settings, history: History, step: int, share: Fraction, least: Fraction) -> Raised | None:
    """What `share` becomes after the evaluation at `step` of the run that `history` ends with; None where it stays.

    `least`: the stage's own share. A loss that is not a number asks for all that is allowed.
    """
    if not history.stages or history.rows[-1].step != step:
        return None
    told = {limit: history.column(limit.source) for limit in settings.forgetting}
    lost = {limit: forgetting(losses) for limit, losses in told.items() if losses[-1] is not None}
    if not lost:
        return None
    excess = {limit: math.inf if math.isnan(nats) else nats - limit.above for limit, nats in lost.items()}
    worst = max(excess, key=excess.__getitem__)
    asked = min(1.0, max(0.0, float(share) + settings.gain * excess[worst]))
    raised = min(settings.at_most, max(least, Fraction(round(asked * _STEPS), _STEPS)))
    return None if raised == share else Raised(raised, worst.source, lost[worst])
