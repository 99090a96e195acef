"""What a report says as plain values, for other programs: score matrix, measures, hours and passages of each run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cpt.evaluation import forgetting, rise
from cpt.evaluation.measures import measures, passages
from cpt.report.runs import RunRecord


def as_plain(runs: Sequence[RunRecord], baseline: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The runs as a mapping that JSON can hold; numbers that are none, which it cannot, are null."""
    return _finite({"runs": [_of_run(run, baseline) for run in runs]})


def _of_run(run: RunRecord, baseline: Mapping[str, float] | None) -> dict[str, Any]:
    matrix = run.scores
    return {
        "run": run.label,
        "folder": str(run.folder),
        "parent": dataclasses.asdict(run.parent) if run.parent else None,
        "tokens": run.tokens,
        "scores": [
            {
                "step": row.step,
                "tokens": row.tokens,
                "stage": row.stage,
                "stage_end": row.is_stage_end,
                "scores": {source: dataclasses.asdict(score) for source, score in row.scores.items()},
            }
            for row in matrix.rows
        ],
        "forgetting": {source: forgetting(matrix.column(source)) for source in matrix.sources},
        "rise": {source: rise(matrix.column(source)) for source in matrix.sources},
        "measures": dataclasses.asdict(measures(run.history, baseline)) if run.history else None,
        "goodput": {**dataclasses.asdict(run.goodput), "share": run.goodput.share} if run.goodput else None,
        "passages": [dataclasses.asdict(one) for one in passages(run.history)] if run.history else None,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
