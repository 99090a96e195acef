"""What was learned, kept and lost over the stages of a lineage: the measures that papers name, with their signs.

L(i, j): loss of source j after stage i in nats a token, lower is better; L(0, j): before the first step of the eldest
run. Source j is learned in its own stage o(j), the first that names it among its sources; T is the newest stage, as far
as it has come. Held-out text that no stage learns has no own stage and is in none of the means.

    learned       mean over j of L(o(j), j)                       lower is better
    retained      mean over j of L(T, j)                          lower is better
    forgetting    mean over old j of L(T, j) - best so far        0 or above: something was lost
    BWT           mean over old j of L(o(j), j) - L(T, j)         positive: later stages helped; negative: forgotten
    FWT           mean over j with o(j) > 1 of                    positive: earlier stages helped before it was learned
                  L(0, j) - L(o(j) - 1, j), or a baseline's loss in the place of L(0, j)

Old is what was learned before stage T. `best so far` is over all evaluations, on the way too. BWT and FWT are defined
on accuracies in their sources; with losses the sign is turned, so that they mean the same.

Of one source j that stage i does not learn, with its loss b before the stage and l(t) in the evaluations of the stage:

    recovery      tokens from the stage's beginning to the evaluation from which on l stays within `tolerance` of b;
                  0 if it never left; None if it has not come back in the stage
    gap           depth of the stability gap: the largest part of a rise above b that went away again in the stage,
                  max over t of l(t) - max(b, lowest l from t on); 0 if nothing did

Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840 (BWT, FWT); Chaudhry et al. 2018, arXiv:1801.10112 (forgetting);
arXiv:2508.01908 (learned and retained loss); De Lange et al. 2023, arXiv:2205.13452 (stability gap).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cpt.evaluation.forgetting import forgetting
from cpt.evaluation.history import History

TOLERANCE = 0.01  # nats a token


@dataclass(frozen=True)
class Measures:
    """The means over sources; None where there is none to take it over."""

    learned: float | None
    retained: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None


@dataclass(frozen=True)
class Passage:
    """What one stage did to a source that it does not learn. `gap` in nats, `recovery_tokens` as told above."""

    run: str
    stage: str
    source: str
    before: float
    after: float
    gap: float
    recovery_tokens: int | None


def measures(history: History, baseline: Mapping[str, float] | None = None) -> Measures:
    """The means over the sources of a history; `baseline`: losses in the place of those before the first step."""
    own, newest = own_stages(history), len(history.stages) - 1
    first = {source: score.loss for source, score in history.row_0.scores.items()} if baseline is None else baseline
    after_own = {source: history.stages[stage].after(source) for source, stage in own.items()}
    now = {source: history.before(newest + 1, source) for source in own}
    old = [source for source, stage in own.items() if stage < newest]
    later = [source for source, stage in own.items() if stage > 0 and source in first]
    return Measures(
        learned=_mean(after_own[source] for source in own),
        retained=_mean(now[source] for source in own),
        forgetting=_mean(forgetting(history.column(source)) for source in old),
        backward_transfer=_mean(_less(after_own[source], now[source]) for source in old),
        forward_transfer=_mean(_less(first[source], history.before(own[source], source)) for source in later),
    )


def own_stages(history: History) -> dict[str, int]:
    """The number of the stage that learned each source, for those that were evaluated after it."""
    own: dict[str, int] = {}
    for number, stage in enumerate(history.stages):
        for source in stage.sources:
            if stage.after(source) is not None:
                own.setdefault(source, number)
    return own


def passages(history: History, tolerance: float = TOLERANCE) -> tuple[Passage, ...]:
    """What each stage did to each source that it does not learn and that was evaluated before it and in it."""
    told = []
    for number, stage in enumerate(history.stages):
        for source in history.sources:
            before, after = history.before(number, source), stage.after(source)
            if source in stage.sources or before is None or after is None:
                continue
            course = [
                (row.tokens - stage.tokens_before, row.scores[source].loss)
                for row in stage.rows
                if source in row.scores
            ]
            gap, recovery = gap_depth(before, [loss for _, loss in course]), recovery_tokens(before, course, tolerance)
            told.append(Passage(stage.run, stage.name, source, before, after, gap, recovery))
    return tuple(told)


def recovery_tokens(before: float, course: Iterable[tuple[int, float]], tolerance: float = TOLERANCE) -> int | None:
    """Tokens until a loss is back within `tolerance` of `before` and stays there; 0 if it never left, None if it has
    not come back. `course`: (tokens, loss) in order. A loss that is not a number is not back.
    """
    back: int | None = 0
    for tokens, loss in course:
        if not loss <= before + tolerance:
            back = None
        elif back is None:
            back = tokens
    return back


def gap_depth(before: float, losses: Iterable[float]) -> float:
    """The largest part of a rise above `before` that went away again, in nats; 0 if none did."""
    depth, lowest_from_here = 0.0, math.inf
    for loss in reversed(list(losses)):
        lowest_from_here = min(lowest_from_here, loss)
        depth = max(depth, loss - max(before, lowest_from_here))
    return depth


def lines_about(history: History) -> list[str]:
    """The measures and what the newest stage did to each source that it does not learn, as lines for a log; nothing
    where there are no stages yet.
    """
    if not history.stages:
        return []
    found, newest = measures(history), history.stages[-1]
    plain = [("learned", found.learned), ("retained", found.retained)]
    signed = [
        ("forgetting", found.forgetting),
        ("BWT", found.backward_transfer),
        ("FWT", found.forward_transfer),
    ]
    told = [f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in plain]
    told += [f"{name} {'-' if value is None else f'{value:+.4f}'}" for name, value in signed]
    return [
        ", ".join(told),
        *(
            f"{one.source} {one.before:.4f} to {one.after:.4f} ({one.after - one.before:+.4f}), gap {one.gap:.4f}, "
            f"{told_recovery(one.recovery_tokens)}"
            for one in passages(history)
            if (one.run, one.stage) == (newest.run, newest.name)
        ),
    ]


def told_recovery(tokens: int | None) -> str:
    """`never away`, `not back`, or `back after 4096 tokens`."""
    return "not back" if tokens is None else f"back after {tokens} tokens" if tokens else "never away"


def _less(loss: float | None, other: float | None) -> float | None:
    return None if loss is None or other is None else loss - other


def _mean(losses: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if known else None
