"""What was learned and what was lost: the score matrix of a run and the numbers read from it."""

from cpt.evaluation.forgetting import (
    Score,
    ScoreMatrix,
    ScoreRow,
    best,
    forgetting,
    last,
    rise,
    score_matrix,
)

__all__ = [
    "Score",
    "ScoreMatrix",
    "ScoreRow",
    "best",
    "forgetting",
    "last",
    "rise",
    "score_matrix",
]
