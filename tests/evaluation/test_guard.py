"""When a run is stopped for what it forgot, and what it says then."""

from __future__ import annotations

import pytest

from cpt.evaluation import score_matrix
from cpt.evaluation.guard import Limit, Settings, verdict_after
from cpt.evaluation.history import History, Part, joined

NOT_A_NUMBER = float("nan")


def history(*losses: dict[str, float]) -> History:
    lines = [
        {"step": step, "tokens": step, "stage": "only", "source": source, "loss": loss}
        for step, row in enumerate(losses)
        for source, loss in row.items()
    ]
    return joined([Part("run", score_matrix(lines), {})])


def limits(**above: float) -> Settings:
    return Settings(tuple(Limit(source, value) for source, value in above.items()))


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([3.0, 3.25], False),  # as much as is allowed
        ([3.0, 3.375], True),
        ([3.0, 2.5, 2.875], True),  # above its best, though below row 0
        ([3.0, 3.5, 3.25], False),  # it has come back
        ([3.0, NOT_A_NUMBER], True),
    ],
)
def test_a_run_stops_when_a_source_lies_further_above_its_best_than_allowed(losses, stops):
    rows = [{"en": loss, "de": 1.0} for loss in losses]
    verdict = verdict_after(limits(en=0.25), history(*rows), len(losses) - 1)
    assert (verdict is not None) == stops


def test_the_first_limit_that_is_exceeded_is_told_with_its_numbers():
    rows = history({"en": 3.0, "de": 2.0}, {"en": 3.2, "de": 2.5})
    verdict = verdict_after(limits(en=0.5, de=0.25), rows, 1)
    assert vars(verdict) == {"source": "de", "forgetting": 0.5, "above": 0.25, "best": 2.0, "loss": 2.5}
    assert verdict.as_line(7) == (
        "stopped after step 7, which is saved: de has lost 0.5000 nats a token, stop_if.forgetting allows 0.25 (best "
        "so far 2.0000, now 2.5000). The same command with a higher limit, or without one, goes on from there; a child "
        "of an earlier step can replay more"
    )


def test_a_loss_that_is_no_number_is_told_and_noted():
    verdict = verdict_after(limits(en=0.1), history({"en": NOT_A_NUMBER}, {"en": NOT_A_NUMBER}), 1)
    assert "best so far never a number, now nan" in verdict.as_line(1)
    assert verdict.as_json() == {"source": "en", "forgetting": "nan", "above": 0.1, "best": None, "loss": "nan"}


def test_only_an_evaluation_at_that_step_stops_and_not_the_one_before_the_first_step():
    rows = history({"en": 3.0}, {"en": 4.0})
    assert verdict_after(limits(en=0.1), rows, 2) is None
    assert verdict_after(limits(en=0.1), history({"en": 3.0}), 0) is None
    assert verdict_after(limits(fr=0.1), rows, 1) is None
    assert verdict_after(Settings(), rows, 1) is None
    base = Part("base", score_matrix([{"step": 5, "stage": "a", "source": "en", "loss": 2.0}]), {}, 5, 50)
    child = Part("child", score_matrix([{"step": 0, "source": "en", "loss": 9.0}]), {})
    assert verdict_after(limits(en=0.1), joined([base, child]), 5) is None, "the parent's step of that number"


def test_the_best_of_a_parent_counts():
    lines = [{"step": 0, "source": "en", "loss": 4.0}, {"step": 5, "stage": "a", "source": "en", "loss": 2.0}]
    base = Part("base", score_matrix(lines), {}, last_step=5, tokens=50)
    child = [{"step": 0, "source": "en", "loss": 2.0}, {"step": 1, "stage": "b", "source": "en", "loss": 2.5}]
    assert verdict_after(limits(en=0.4), joined([base, Part("child", score_matrix(child), {})]), 1).forgetting == 0.5
