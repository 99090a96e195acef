"""Where we are is counted from 0 and only ever goes on."""

from __future__ import annotations

import pytest

from cpt.progress import Progress


def test_a_step_counts_in_the_run_and_in_the_stage():
    assert Progress(3, 300, 1, 2, 200).after_step(50) == Progress(4, 350, 1, 3, 250, 50)


def test_the_next_stage_begins_at_the_same_place_of_the_run():
    assert Progress(3, 300, 1, 2, 200).at_next_stage() == Progress(3, 300, 2, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "every_tokens", "answer"),
    [
        (100, 100, 100, True),
        (99, 99, 100, False),
        (199, 100, 100, True),
        (199, 99, 100, False),
        (200, 1, 100, True),
        (201, 1, 100, False),
        (1000, 1000, 100, True),
        (0, 0, 100, False),
        (500, 500, None, False),
    ],
)
def test_a_step_crosses_a_multiple_once(tokens, num_tokens, every_tokens, answer):
    assert Progress(tokens=tokens, step_tokens=num_tokens).crosses(every_tokens) is answer


def test_every_multiple_is_crossed_by_exactly_one_step():
    places = [Progress(tokens=tokens, step_tokens=7) for tokens in range(7, 7 * 101, 7)]
    assert sum(place.crosses(50) for place in places) == 700 // 50
