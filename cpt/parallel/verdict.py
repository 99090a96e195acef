"""What the signs of life of all ranks mean together: somebody failed, is gone or hangs, or all is well.

    failed   a rank said so itself, before it ended
    lost     its thread that gives signs does so no more: killed, stopped, no machine, no network
    hung     all ranks give signs, but none has got any further: it is the one behind the others that they wait for
    broken   a connection between ranks is, though all of them are there

Every rank goes through the same places in the same order, and counts them: who has counted least is behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Where ranks say that they are. In the slow ones they may be silent for longer: files are read or written, and what is
# compiled is compiled.
STARTING, FIRST_STEP, SAVING = "starting", "computing for the first time", "saving"
FIRST_LOADING, FIRST_EVALUATION = "loading data for the first time", "evaluating for the first time"
LOADING, COMPUTING, EVALUATING = "loading data", "computing", "evaluating"
_SLOW = (STARTING, FIRST_LOADING, FIRST_STEP, FIRST_EVALUATION, SAVING)

FAILED, LOST, HUNG, BROKEN = "failed", "lost", "hung", "broken"


@dataclass(frozen=True)
class Limits:
    """Seconds. `evidence`: without a sign from a rank once another one has lost a connection, and for being broken."""

    hang: float | None
    slow: float
    lost: float
    evidence: float
    beat: float

    def silence(self, phase: str) -> float:
        """How long a rank may be in one place of that kind; without end where hangs are not looked for."""
        if self.hang is None:
            return math.inf
        return max(self.hang, self.slow) if phase in _SLOW else self.hang


@dataclass(frozen=True)
class Sign:
    """What a rank says every few seconds: the last place it came to, and how many `seconds` ago by its own clock.

    `count`: places it came to so far. `broken`: what a broken connection said to it. `failed`: why it is about to end.
    `has_heard`: that the run ends; `is_closed`: it watches no more, and may have ended.
    """

    node: str
    beat: int = 0
    count: int = 0
    phase: str = STARTING
    step: int = 0
    seconds: float = 0.0
    broken: str | None = None
    failed: str | None = None
    has_heard: bool = False
    is_closed: bool = False

    @property
    def place(self) -> str:
        """`loading data for step 120`."""
        return f"{self.phase} for step {self.step}" if self.step else self.phase


@dataclass(frozen=True)
class Verdict:
    """Why the run ends now. `rank` and `node`: whose fault it is, None if that is nobody's in particular."""

    kind: str
    reason: str
    rank: int | None = None
    node: str | None = None
    step: int = 0


def judge(signs: Sequence[Sign], quiet: Sequence[float], limits: Limits) -> Verdict | None:
    """What to make of the last sign of each rank, which came `quiet` seconds ago; None as long as all is well."""
    for rank, sign in enumerate(signs):
        if sign.failed is not None:
            reason = f"rank {rank} on {sign.node} failed: {sign.failed}"
            return Verdict(FAILED, reason, rank, sign.node, sign.step)
    open_ranks = [rank for rank, sign in enumerate(signs) if not sign.is_closed]
    broken = [rank for rank in open_ranks if signs[rank].broken is not None]
    limit = min(limits.lost, limits.evidence) if broken else limits.lost
    if any(quiet[rank] > limit for rank in open_ranks):
        # Those of a machine that failed are silent alike, to within a beat.
        lost = [rank for rank in open_ranks if quiet[rank] > max(limit - 2 * limits.beat, limit / 2)]
        return lost_verdict(signs, lost, max(quiet[rank] for rank in lost), limits, bool(broken))
    ages = {rank: signs[rank].seconds + quiet[rank] for rank in open_ranks}
    # Longer than the evidence: who is gone is found first.
    if broken and all(ages[rank] > limits.evidence + 2 * limits.beat for rank in broken):
        told = f"{told_ranks(signs, broken)}: {signs[broken[0]].broken}"
        what = f"a connection between ranks broke, though all of them are there ({told})"
        return _stuck(BROKEN, what, signs, open_ranks)
    silence = max((limits.silence(signs[rank].phase) for rank in open_ranks), default=math.inf)
    if ages and min(ages.values()) > silence:
        who = "nothing" if len(signs) == 1 else f"none of {len(signs)} ranks"
        limit_name = "watch.hang_seconds" if silence == limits.hang else "watch.slow_seconds"
        what = f"{who} has got any further for {min(ages.values()):.0f} s ({limit_name} = {silence:g})"
        return _stuck(HUNG, what, signs, open_ranks)
    return None


def lost_verdict(
    signs: Sequence[Sign], lost: Sequence[int], seconds: float, limits: Limits, has_evidence: bool
) -> Verdict:
    """These ranks are gone, of which nothing was heard for so long."""
    first, isare = signs[lost[0]], "are" if len(lost) > 1 else "is"
    why = (
        "connections to it broke: killed, out of memory, or its machine or network failed"
        if has_evidence
        else f"watch.lost_seconds = {limits.lost:g}: killed or stopped, held up within a library, or its machine or "
        "network failed"
    )
    reason = (
        f"{told_ranks(signs, lost)} {isare} gone: no sign of life for {seconds:.0f} s ({why}); last seen {first.place}"
    )
    return Verdict(LOST, reason, lost[0], first.node, first.step)


def told_ranks(signs: Sequence[Sign], ranks: Sequence[int]) -> str:
    """`rank 3 on n2`, `ranks 4, 5 on n3 and 6 on n4`; of many the first eight and how many more there are."""
    nodes: dict[str, list[str]] = {}
    for rank in ranks[:8]:
        nodes.setdefault(signs[rank].node, []).append(str(rank))
    told = " and ".join(f"{', '.join(numbers)} on {node}" for node, numbers in nodes.items())
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {told}{more}"


def _stuck(kind: str, what: str, signs: Sequence[Sign], open_ranks: Sequence[int]) -> Verdict:
    """All are there and get no further: who is behind the others, if somebody is."""
    closed = [rank for rank in range(len(signs)) if rank not in open_ranks]
    least = min(signs[rank].count for rank in open_ranks)
    behind = [rank for rank in open_ranks if signs[rank].count == least]
    first = signs[behind[0]]
    if len(signs) == 1:
        return Verdict(kind, f"{what}: {first.place}", 0, first.node, first.step)
    if closed:
        reason = f"{what}: they wait for {told_ranks(signs, closed)}, which ended before"
        return Verdict(kind, reason, closed[0], signs[closed[0]].node, first.step)
    if len(behind) == len(signs):
        reason = f"{what}: all are at the same place, {first.place}; a sum between them does not end, or none was asked"
        return Verdict(kind, reason, step=first.step)
    others = next(sign for sign in signs if sign.count > least)
    verb = "are" if len(behind) > 1 else "is"
    reason = f"{what}: {told_ranks(signs, behind)} {verb} behind, {first.place}; the others wait, {others.place}"
    return Verdict(kind, reason, behind[0], first.node, first.step)
