"""The score matrix of a run, and what it says was learned and lost; plain arithmetic on the lines of scores.jsonl.

                    prose   code
    before           3.10   4.20    row 0: before the first step
    step 100         3.60   2.90    each later row: one evaluation, in order
    step 200, end    3.40   2.60

All scores are losses in nats a token on held-out text: lower is better. Every difference here is signed so that
positive means worse than before:

    forgetting(source) = last - best so far, row 0 included; 0 where the last is the best, never below   prose +0.30
    rise(source)       = last - row 0; negative where something was learned                              code  -1.60

What is read from many stages, and from a run and its parents, is in cpt/evaluation/measures.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cpt.config import Fault

START = "start"


@dataclass(frozen=True)
class Score:
    """One source in one evaluation: the loss in nats a token, and bits per byte of text where bytes are known.

    `interval`: half the width of the 95 % interval around the loss, None where it is not known.
    """

    loss: float
    bits_per_byte: float | None = None
    evaluated_tokens: int | None = None
    interval: float | None = None


@dataclass(frozen=True)
class ScoreRow:
    """One evaluation: where the run was, and the score of each source that was evaluated there."""

    step: int
    tokens: int
    stage: str  # the stage that was running or had just ended; START in row 0
    is_stage_end: bool = False
    scores: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreMatrix:
    """Evaluations by sources. Row 0 is always there and is before the first step, without scores if none were taken."""

    sources: tuple[str, ...]  # in the order in which they were first evaluated
    rows: tuple[ScoreRow, ...]

    def column(self, source: str) -> tuple[float | None, ...]:
        """The losses of a source, one a row; None where it was not evaluated."""
        return tuple(row.scores[source].loss if source in row.scores else None for row in self.rows)

    def last_score(self, source: str) -> Score | None:
        """The newest score of a source; None if there is none."""
        return next((row.scores[source] for row in reversed(self.rows) if source in row.scores), None)

    def milestones(self) -> tuple[ScoreRow, ...]:
        """Row 0, the end of each stage and the newest evaluation: the matrix without the evaluations on the way."""
        return tuple(row for row in self.rows if row.is_stage_end or row in (self.rows[0], self.rows[-1]))


def score_matrix(lines: Iterable[Mapping[str, object]]) -> ScoreMatrix:
    """The matrix from the lines of scores.jsonl, in the order in which they were written.

    Where the steps go back, the run was stopped and went on from an earlier checkpoint: the rows from there on are
    those of the run as it went on, and the lost ones are left out.

    Raises Fault, naming the line, where a line lacks what it needs.
    """
    sources: dict[str, None] = {}
    rows: dict[int, ScoreRow] = {}
    newest_step = 0
    for number, line in enumerate(lines, start=1):
        row = parse(line, number)
        if row.step < newest_step:
            rows = {step: kept for step, kept in rows.items() if step < row.step}
        newest_step = row.step
        sources.update(dict.fromkeys(row.scores))
        earlier = rows[row.step].scores if row.step in rows else {}
        rows[row.step] = dataclasses.replace(row, scores={**earlier, **row.scores})
    rows.setdefault(0, ScoreRow(step=0, tokens=0, stage=START))
    return ScoreMatrix(tuple(sources), tuple(rows[step] for step in sorted(rows)))


def parse(line: Mapping[str, object], number: int) -> ScoreRow:
    """One line of scores.jsonl: a row with a single score."""
    missing = [name for name in ("step", "source", "loss") if line.get(name) is None]
    if missing:
        raise Fault(f"score line {number} has no {' and no '.join(missing)}")
    try:
        bits, evaluated, interval = (line.get(name) for name in ("bits_per_byte", "evaluated_tokens", "interval"))
        score = Score(
            loss=float(line["loss"]),
            bits_per_byte=None if bits is None else float(bits),
            evaluated_tokens=None if evaluated is None else int(evaluated),
            interval=None if interval is None else float(interval),
        )
        return ScoreRow(
            step=int(line["step"]),
            tokens=int(line.get("tokens") or 0),
            stage=START if int(line["step"]) == 0 else str(line.get("stage", "")),
            is_stage_end=bool(line.get("stage_end", False)),
            scores={str(line["source"]): score},
        )
    except (TypeError, ValueError) as error:
        raise Fault(f"score line {number} has a value that is no number: {error}") from None


# ---- numbers of one source: `losses` is a column of the matrix, row 0 first


def last(losses: Sequence[float | None]) -> float | None:
    """The newest loss; None if there is none."""
    return next((loss for loss in reversed(losses) if loss is not None), None)


def best(losses: Sequence[float | None]) -> float | None:
    """The lowest loss so far; None if there is none. A loss that is not a number is never the best."""
    return min((loss for loss in losses if loss is not None and not math.isnan(loss)), default=None)


def forgetting(losses: Sequence[float | None]) -> float | None:
    """How far the newest loss lies above the lowest so far, row 0 included; None if there is no loss.

    Positive when something was lost; 0 when the newest is the best; never negative. Not a number if the newest is none.
    """
    newest = last(losses)
    if newest is None or math.isnan(newest):
        return newest
    lowest = best(losses)
    return 0.0 if newest == lowest else newest - lowest  # the difference of two infinite losses would be no number


def rise(losses: Sequence[float | None]) -> float | None:
    """The newest loss less the one before the first step: negative when learned, positive when lost.

    None if the source was not evaluated before the first step.
    """
    newest = last(losses)
    if newest is None or losses[0] is None:
        return None
    return newest - losses[0]
