"""The score matrix and its numbers, worked out by hand on small tables."""

from __future__ import annotations

import math

import pytest

from cpt.config import Fault
from cpt.evaluation import best, forgetting, last, rise, score_matrix

NOT_A_NUMBER = float("nan")
INFINITE = float("inf")


def line(step: int, source: str, loss: float, stage: str = "code", **more: object) -> dict[str, object]:
    return {
        "step": step,
        "tokens": step * 10,
        "stage": "start" if step == 0 else stage,
        "source": source,
        "loss": loss,
        **more,
    }


def two_stages():
    """Row 0, one evaluation on the way, the ends of the stages `code` and `law`."""
    return score_matrix(
        [
            line(0, "prose", 3.0), line(0, "code", 4.0), line(0, "law", 5.0),
            line(5, "prose", 2.75), line(5, "code", 3.0), line(5, "law", 4.5),
            line(9, "prose", 3.5, stage_end=True), line(9, "code", 2.0, stage_end=True),
            line(9, "law", 4.0, stage_end=True),
            line(20, "prose", 3.25, stage="law", stage_end=True), line(20, "code", 2.5, stage="law", stage_end=True),
            line(20, "law", 1.5, stage="law", stage_end=True),
        ]
    )  # fmt: skip


def test_rows_are_evaluations_and_columns_are_sources():
    matrix = two_stages()
    assert matrix.sources == ("prose", "code", "law")
    assert [(row.step, row.tokens, row.stage, row.is_stage_end) for row in matrix.rows] == [
        (0, 0, "start", False), (5, 50, "code", False), (9, 90, "code", True), (20, 200, "law", True),
    ]  # fmt: skip
    assert matrix.column("code") == (4.0, 3.0, 2.0, 2.5)


def test_milestones_leave_out_the_evaluations_on_the_way():
    assert [row.step for row in two_stages().milestones()] == [0, 9, 20]


def test_the_newest_evaluation_of_a_stage_that_runs_is_a_milestone():
    matrix = score_matrix([line(0, "prose", 3.0), line(5, "prose", 3.0), line(6, "prose", 3.0)])
    assert [row.step for row in matrix.milestones()] == [0, 6]


def test_row_0_is_there_without_scores_when_nothing_was_evaluated_before_the_first_step():
    matrix = score_matrix([line(5, "prose", 3.0)])
    assert matrix.column("prose") == (None, 3.0)
    assert score_matrix([]).rows[0].stage == "start"


def test_a_source_that_came_later_has_empty_cells():
    matrix = score_matrix([line(0, "prose", 3.0), line(5, "prose", 3.1), line(5, "law", 4.0)])
    assert matrix.column("law") == (None, 4.0)


def test_a_run_that_went_back_keeps_only_what_it_did_after():
    lines = [line(0, "prose", 3.0), line(4, "prose", 2.0), line(8, "prose", 1.0), line(6, "prose", 2.5)]
    matrix = score_matrix(lines)
    assert [row.step for row in matrix.rows] == [0, 4, 6]
    assert matrix.column("prose") == (3.0, 2.0, 2.5)


def test_the_later_of_two_scores_of_one_step_and_source_counts():
    assert score_matrix([line(4, "prose", 2.0), line(4, "prose", 2.5)]).column("prose") == (None, 2.5)


def test_bits_per_byte_and_tokens_are_kept_with_the_newest_score():
    matrix = score_matrix([line(4, "prose", 2.0, bits_per_byte=1.5, evaluated_tokens=77), line(8, "law", 1.0)])
    assert matrix.last_score("prose").bits_per_byte == 1.5
    assert matrix.last_score("prose").evaluated_tokens == 77
    assert matrix.last_score("law").bits_per_byte is None
    assert matrix.last_score("unknown") is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((3.0, 3.75), 0.75),  # lost
        ((4.0, 2.5), 0.0),  # learned: now is the best
        ((3.0, 2.5, 3.25), 0.75),  # learned and then lost: above the best, not above row 0
        ((3.0, 3.75, 3.25), 0.25),  # lost and half won back
        ((3.0,), 0.0),
        ((None, 3.0, 3.5), 0.5),
        ((3.0, 3.5, None), 0.5),  # not evaluated in the last row: the newest there is
        ((NOT_A_NUMBER, 3.0, 3.5), 0.5),
        ((3.0, INFINITE), INFINITE),
        ((INFINITE, INFINITE), 0.0),
        ((None, None), None),
        ((), None),
    ],
)
def test_forgetting_is_the_height_above_the_best_so_far(losses, expected):
    assert forgetting(losses) == expected


def test_forgetting_is_not_a_number_when_the_newest_loss_is_none():
    assert math.isnan(forgetting((3.0, NOT_A_NUMBER)))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [((3.0, 3.75), 0.75), ((4.0, 2.5), -1.5), ((3.0, 2.5, 3.25), 0.25), ((None, 3.0), None), ((3.0,), 0.0), ((), None)],
)
def test_rise_is_measured_from_before_the_first_step(losses, expected):
    assert rise(losses) == expected


def test_last_and_best_pass_over_what_was_not_evaluated():
    assert last((3.0, 2.0, None)) == 2.0
    assert best((None, 3.0, 2.0, 2.5)) == 2.0
    assert best((NOT_A_NUMBER,)) is None


def test_a_line_without_its_values_is_told_by_its_number():
    with pytest.raises(Fault, match="score line 2 has no source and no loss"):
        score_matrix([line(0, "prose", 3.0), {"step": 4}])


def test_a_value_that_is_no_number_is_told_by_its_line():
    with pytest.raises(Fault, match="score line 1 has a value that is no number: .*'low'"):
        score_matrix([line(0, "prose", "low")])
