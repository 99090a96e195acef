"""The scores of a run and of the runs it descends from as one history of stages; read from their folders.

    eldest ancestor              its child, left at step 400              this run
    row 0 | stage a | stage b    row 0 = the end of stage b | stage c     row 0 = the end of stage c | stage d ...

Row 0 of a child is taken as its parent's last row: the weights are the same. What an ancestor did after its child had
left it is not part of the history. Tokens count from the beginning of the eldest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import Fault, read_mapping
from cpt.evaluation.forgetting import START, ScoreMatrix, ScoreRow, score_matrix
from cpt.lineage import tree
from cpt.observe.records import read_records


@dataclass(frozen=True)
class StageScores:
    """The evaluations of one stage, the last of which is its end if it has ended. `sources`: what it learned."""

    run: str
    name: str
    sources: tuple[str, ...]
    tokens_before: int
    rows: tuple[ScoreRow, ...]

    def after(self, source: str) -> float | None:
        """The newest loss of a source in this stage; None if it was not evaluated in it."""
        return next((row.scores[source].loss for row in reversed(self.rows) if source in row.scores), None)


@dataclass(frozen=True)
class History:
    """Row 0 of the eldest run, and the stages since."""

    row_0: ScoreRow
    stages: tuple[StageScores, ...]

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        """All evaluations, row 0 first."""
        return (self.row_0, *(row for stage in self.stages for row in stage.rows))

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that was ever evaluated, in order of appearance."""
        return tuple(dict.fromkeys(source for row in self.rows for source in row.scores))

    def column(self, source: str) -> tuple[float | None, ...]:
        """The losses of a source, one a row; None where it was not evaluated."""
        return tuple(row.scores[source].loss if source in row.scores else None for row in self.rows)

    def before(self, stage: int, source: str) -> float | None:
        """The newest loss of a source before the stage of that number; None if it was not evaluated before."""
        earlier = [one.after(source) for one in self.stages[:stage]]
        at_first = self.row_0.scores.get(source)
        return next((loss for loss in reversed(earlier) if loss is not None), at_first.loss if at_first else None)


@dataclass(frozen=True)
class Part:
    """One run of a lineage. `sources`: what each of its stages learns, by the stage's name. `last_step`, `tokens`:
    where its child left it; None for the youngest.
    """

    run: str
    scores: ScoreMatrix
    sources: Mapping[str, tuple[str, ...]]
    last_step: int | None = None
    tokens: int | None = None


def read_history(run: Path) -> History:
    """The history of the run in that folder; it begins later where an ancestor's folder is gone.

    Raises Fault for a line of scores or a lineage that is damaged.
    """
    members = tree.ancestry(run) if (run / "lineage.json").is_file() else [tree.Member(run, None)]
    left_at: list[tree.Parent | None] = [None, *(member.parent for member in members)]
    parts = [
        Part(
            member.run.resolve().name,
            _scores_of(member.run),
            _sources_of(member.run),
            above.step if above else None,
            above.tokens if above else None,
        )
        for member, above in zip(members, left_at, strict=False)
    ]
    return joined(parts[::-1])


def joined(parts: Sequence[Part]) -> History:
    """The history of a lineage from its runs, eldest first."""
    row_0 = ScoreRow(step=0, tokens=0, stage=START)
    stages: list[StageScores] = []
    tokens_before = 0
    for part in parts:
        num_before = len(stages)  # a child may call its stage, and itself, as its parent did
        for row in part.scores.rows:
            if part.last_step is not None and row.step > part.last_step:
                break
            row = dataclasses.replace(row, tokens=tokens_before + row.tokens)
            if row.step == 0 and not stages:
                row_0 = _over(row_0, row)
            elif row.step == 0:
                stages[-1] = _ended(stages[-1], row)
            elif len(stages) > num_before and stages[-1].name == row.stage:
                stages[-1] = dataclasses.replace(stages[-1], rows=(*stages[-1].rows, row))
            else:
                began = stages[-1].rows[-1].tokens if len(stages) > num_before else tokens_before
                stages.append(StageScores(part.run, row.stage, part.sources.get(row.stage, ()), began, (row,)))
        tokens_before += part.tokens or 0
    return History(row_0, tuple(stages))


def _over(row: ScoreRow, newer: ScoreRow) -> ScoreRow:
    """The same place with the scores of both, the newer ones where both have one."""
    return dataclasses.replace(newer, scores={**row.scores, **newer.scores})


def _ended(stage: StageScores, row: ScoreRow) -> StageScores:
    """The stage with a child's row 0 as its end."""
    end = dataclasses.replace(row, stage=stage.name, is_stage_end=True)
    if stage.rows[-1].tokens != row.tokens:
        return dataclasses.replace(stage, rows=(*stage.rows, end))
    return dataclasses.replace(stage, rows=(*stage.rows[:-1], _over(stage.rows[-1], end)))


def _scores_of(run: Path) -> ScoreMatrix:
    path = run / "scores.jsonl"
    if not path.is_file():
        return score_matrix([])
    try:
        return score_matrix(read_records(path))
    except Fault as fault:
        raise Fault(f"{path}: {line}" for line in fault.lines) from None
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}); mend it or take the line out") from None


def _sources_of(run: Path) -> dict[str, tuple[str, ...]]:
    """What the stages in a run's `run.yaml` learn; nothing where there is none."""
    if not (run / "run.yaml").is_file():
        return {}
    stages: Any = read_mapping([str(run / "run.yaml")]).get("stages")
    stages = stages if isinstance(stages, list) else []
    return {str(stage.get("name")): tuple(stage.get("sources") or ()) for stage in stages if isinstance(stage, dict)}
