"""How far replay's share is raised for what was forgotten, worked by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cpt.evaluation import score_matrix
from cpt.evaluation.guard import Limit
from cpt.evaluation.history import History, Part, joined
from cpt.evaluation.raise_replay import Settings, share_after

QUARTER, TENTH = Fraction(1, 4), Fraction(1, 10)


def history(*losses: dict[str, float]) -> History:
    lines = [
        {"step": step, "tokens": step, "stage": "only", "source": source, "loss": loss}
        for step, row in enumerate(losses)
        for source, loss in row.items()
    ]
    return joined([Part("run", score_matrix(lines), {})])


def after(losses: list[float], share: Fraction, least: Fraction = TENTH, **more):
    settings = Settings((Limit("en", 0.25),), **{"gain": 0.5, "at_most": Fraction(1, 2), **more})
    return share_after(settings, history(*({"en": loss} for loss in losses)), len(losses) - 1, share, least)


@pytest.mark.parametrize(
    ("losses", "share", "expected"),
    [
        ([3.0, 3.5], TENTH, Fraction(225, 1000)),  # 0.25 nats too much, half of that in share
        ([3.0, 3.5], Fraction(45, 100), Fraction(1, 2)),  # no more than at_most
        ([3.0, 3.0], Fraction(3, 10), Fraction(175, 1000)),  # less than is allowed: down again
        ([3.0, 3.0], Fraction(2, 10), TENTH),  # but not below the stage's own
        ([3.0, 2.0, 2.3755], QUARTER, Fraction(313, 1000)),  # above its best; in thousandths
        ([3.0, float("nan")], TENTH, Fraction(1, 2)),
        ([3.0, float("inf")], TENTH, Fraction(1, 2)),
    ],
)
def test_the_share_goes_up_by_gain_times_what_is_too_much_and_down_again_within_its_bounds(losses, share, expected):
    assert after(losses, share).share == expected


def test_a_share_that_stays_is_no_change():
    assert after([3.0, 3.25], QUARTER) is None  # just what is allowed
    assert after([3.0, 3.0], TENTH) is None  # at the lower end already
    assert after([3.0, 4.0], Fraction(1, 2)) is None  # at the upper end
    assert after([3.0, 3.0], Fraction(1, 3), least=Fraction(1, 3)) is None  # a share that is no thousandths


def test_the_source_that_is_furthest_above_its_limit_decides_and_is_told():
    settings = Settings((Limit("en", 0.5), Limit("fr", 0.25), Limit("ja", 0.0)), gain=1.0)
    rows = history({"en": 3.0, "fr": 2.0}, {"en": 3.75, "fr": 2.375})
    raised = share_after(settings, rows, 1, TENTH, TENTH)
    assert (raised.source, raised.forgetting, raised.share) == ("en", 0.75, Fraction(35, 100))
    assert raised.as_line("news", 480) == (
        "replay's share in stage news goes to 35% from window 480 on: en has lost 0.7500 nats a token"
    )


def test_only_an_evaluation_at_that_step_counts():
    settings, rows = Settings((Limit("en", 0.0),)), history({"en": 3.0}, {"en": 4.0})
    assert share_after(settings, rows, 2, TENTH, TENTH) is None
    assert share_after(Settings(), rows, 1, TENTH, TENTH) is None
    assert share_after(Settings((Limit("fr", 0.0),)), rows, 1, TENTH, TENTH) is None


def test_settings_that_raise_nothing_are_faults():
    limit = (Limit("en", 0.1),)
    assert Settings(limit).faults() == []
    assert Settings(limit, gain=0.0).faults() == ["gain = 0: above 0; the share rises by gain x nats above the limit"]
    assert Settings(limit, gain=float("inf")).faults()[0].startswith("gain = inf: above 0")
    assert Settings(limit, at_most=Fraction(1)).faults() == ["at_most = 1: above 0 and below 1, such as 50%"]
    assert Settings(limit, at_most=Fraction(0)).faults()[0].startswith("at_most = 0: above 0")
