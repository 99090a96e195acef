"""Learning rates against numbers worked out by hand; each a pure function of progress."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import Fault, build, names_of_choices, read_settings
from cpt.config.choices import settings_of_choice
from cpt.progress import Progress
from cpt.schedules import constant, cosine, rewarm

EXACT = 1e-12


def rate(settings, tokens: int, stage_tokens: int = 1000, rate_before: float = 0.0) -> float:
    return build(settings, "Schedule", stage_tokens, rate_before).rate(Progress(stage_tokens=tokens))


def close(value: float):
    return pytest.approx(value, abs=EXACT, rel=0)


# The 405M model of Ibrahim et al. 2024: warm-up 1,324 steps of 2,260,992 tokens, 132,366 steps in all.
STEP, WARMUP, STEPS = 2_260_992, 1_324, 132_366
OF_405M = cosine.Settings(peak=3e-4, floor=3e-5, warmup_tokens=WARMUP * STEP)


@pytest.mark.parametrize(
    ("share_of_decay", "expected"),
    [
        (Fraction(0), 3e-4),
        (Fraction(1, 4), 2.6045941546018393e-4),  # 3e-5 + 1.35e-4 * (1 + sqrt(2) / 2)
        (Fraction(1, 2), 1.65e-4),
        (Fraction(3, 4), 6.954058453981607e-5),  # 3e-5 + 1.35e-4 * (1 - sqrt(2) / 2)
        (Fraction(1), 3e-5),
    ],
)
def test_the_cosine_of_the_405m_model_is_the_papers(share_of_decay, expected):
    tokens = WARMUP * STEP + share_of_decay * (STEPS - WARMUP) * STEP
    assert tokens.denominator == 1
    assert rate(OF_405M, int(tokens), STEPS * STEP) == close(expected)


def test_the_warm_up_of_the_405m_model_is_a_line_from_nothing():
    assert rate(OF_405M, 0, STEPS * STEP) == 0.0
    assert rate(OF_405M, STEP, STEPS * STEP) == close(3e-4 / 1324)
    assert rate(OF_405M, 662 * STEP, STEPS * STEP) == close(1.5e-4)
    assert rate(OF_405M, 1323 * STEP, STEPS * STEP) == close(3e-4 * 1323 / 1324)
    assert rate(OF_405M, 1324 * STEP, STEPS * STEP) == close(3e-4)
    assert rate(OF_405M, 1325 * STEP, STEPS * STEP) < 3e-4


@pytest.mark.parametrize("tokens", [1000, 1001, 10**9])
@pytest.mark.parametrize("settings", [cosine.Settings(2.0, 0.5), rewarm.Settings(2.0, 0.5)])
def test_what_decays_stays_at_the_floor_after_the_stage(settings, tokens):
    assert rate(settings, tokens) == close(0.5)


def test_a_cosine_without_a_warm_up_begins_at_the_peak():
    assert rate(cosine.Settings(2.0), 0) == 2.0
    assert rate(cosine.Settings(2.0), 500) == close(1.0)
    assert rate(cosine.Settings(2.0), 250) == close(1 + math.sqrt(0.5))


def test_a_constant_rises_in_a_line_and_stays():
    settings = constant.Settings(2.0, warmup_tokens=8)
    assert [rate(settings, tokens) for tokens in (0, 1, 4, 7)] == [close(value) for value in (0.0, 0.25, 1.0, 1.75)]
    assert [rate(settings, tokens) for tokens in (8, 9, 10**12)] == [2.0, 2.0, 2.0]
    assert rate(constant.Settings(2.0), 0) == 2.0


@pytest.mark.parametrize(
    ("rate_before", "expected"),
    [
        (0.0, [0.0, 0.02, 1.0, 1.98]),
        (0.5, [0.5, 0.515, 1.25, 1.985]),
        (2.0, [2.0, 2.0, 2.0, 2.0]),
        (3.0, [3.0, 2.99, 2.5, 2.01]),
    ],
)
def test_a_rewarm_begins_at_the_parents_rate_below_or_above_the_peak(rate_before, expected):
    settings = rewarm.Settings(2.0, 0.4, warmup=Fraction(1, 10))
    assert [rate(settings, tokens, 1000, rate_before) for tokens in (0, 1, 50, 99)] == [close(e) for e in expected]


@pytest.mark.parametrize("rate_before", [0.0, 0.5, 3.0])
def test_a_rewarm_decays_alike_whatever_came_before(rate_before):
    settings = rewarm.Settings(2.0, 0.4, warmup=Fraction(1, 10))
    values = [rate(settings, tokens, 1000, rate_before) for tokens in (100, 325, 550, 775, 1000)]
    half = 0.8 * math.sqrt(0.5)
    assert values == [close(value) for value in (2.0, 1.2 + half, 1.2, 1.2 - half, 0.4)]


def test_a_rewarm_without_a_warm_up_begins_at_the_peak():
    assert rate(rewarm.Settings(2.0, warmup=Fraction(0)), 0, 1000, 0.5) == 2.0


def test_a_rewarm_rises_over_one_hundredth_of_the_stage_unless_told():
    settings = rewarm.Settings(1.0)
    assert rate(settings, 5, 1000) == close(0.5)
    assert rate(settings, 10, 1000) == close(1.0)


def test_a_warm_up_of_a_part_of_a_token_is_none():
    assert rate(rewarm.Settings(1.0), 1, 3) == close(0.5 + 0.5 * math.cos(math.pi * (1 - 0.03) / (3 - 0.03)))


EXAMPLES = {"constant": {"peak": 2.0, "warmup_tokens": 30}, "cosine": {"peak": 2.0, "floor": 0.1, "warmup_tokens": 30},
            "rewarm": {"peak": 2.0, "floor": 0.1}}  # fmt: skip


def schedule_named(name: str):
    """The schedule of this name at the settings above; a new one needs only a peak, or an entry there."""
    return build(read_settings(settings_of_choice("cpt.schedules", name), EXAMPLES.get(name, {"peak": 2.0})),
                 "Schedule", 1000, 0.3)  # fmt: skip


@pytest.mark.parametrize("name", names_of_choices("cpt.schedules"))
def test_every_schedule_is_a_pure_function_of_progress(name):
    places = [Progress(3, 5000, 1, 2, tokens) for tokens in (0, 10, 29, 30, 31, 500, 999, 1000, 1001)]
    one, other = schedule_named(name), schedule_named(name)
    forwards = [one.rate(place) for place in places]
    backwards = [other.rate(place) for place in reversed(places)]
    assert forwards == backwards[::-1]
    assert forwards == [one.rate(place) for place in places]


@pytest.mark.parametrize("name", names_of_choices("cpt.schedules"))
def test_every_schedule_counts_tokens_of_the_stage_alone(name):
    schedule = schedule_named(name)
    for tokens in (0, 10, 500, 1000):
        rates = {schedule.rate(Progress(step, 7 * step, step, step, tokens)) for step in (0, 1, 100)}
        assert len(rates) == 1


@pytest.mark.parametrize("name", names_of_choices("cpt.schedules"))
@given(tokens=st.integers(0, 3000))
def test_every_rate_is_finite_and_within_its_settings(name, tokens):
    assert 0 <= schedule_named(name).rate(Progress(stage_tokens=tokens)) <= 2.0


@pytest.mark.parametrize("name", names_of_choices("cpt.schedules"))
def test_every_schedule_has_frozen_settings(name):
    settings = settings_of_choice("cpt.schedules", name)
    assert dataclasses.is_dataclass(settings)
    assert settings.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("name", "given_settings", "lines"),
    [
        ("constant", {"peak": 0}, ["peak = 0.0: above 0"]),
        ("constant", {"peak": 1, "warmup_tokens": -1}, ["warmup_tokens = -1: at least 0"]),
        ("cosine", {"peak": 1, "floor": 2}, ["floor = 2.0, peak = 1.0: 0 <= floor <= peak, and peak above 0"]),
        ("cosine", {"peak": 0}, ["floor = 0.0, peak = 0.0: 0 <= floor <= peak, and peak above 0"]),
        ("cosine", {"peak": 1, "warmup_tokens": -1}, ["warmup_tokens = -1: at least 0"]),
        ("rewarm", {"peak": 1, "floor": -1}, ["floor = -1.0, peak = 1.0: 0 <= floor <= peak, and peak above 0"]),
        ("rewarm", {"peak": 1, "warmup": 1}, ["warmup = 1.0: a share of the stage, at least 0 and below 1"]),
        ("rewarm", {"peak": -1, "warmup": "-1%"}, [
            "floor = 0.0, peak = -1.0: 0 <= floor <= peak, and peak above 0",
            "warmup = -0.01: a share of the stage, at least 0 and below 1",
        ]),
    ],
)  # fmt: skip
def test_settings_that_make_no_schedule_are_faults(name, given_settings, lines):
    with pytest.raises(Fault) as caught:
        read_settings(settings_of_choice("cpt.schedules", name), given_settings)
    assert list(caught.value.lines) == lines


@pytest.mark.parametrize("warmup_tokens", [1000, 1001])
def test_a_cosine_over_a_stage_no_longer_than_its_warm_up_is_a_fault(warmup_tokens):
    with pytest.raises(Fault) as caught:
        rate(cosine.Settings(1.0, warmup_tokens=warmup_tokens), 0)
    assert str(caught.value) == (
        f"schedule.warmup_tokens = {warmup_tokens:,}: the stage has 1,000 tokens; warm up over fewer"
    )


def test_a_stage_of_no_tokens_is_a_fault():
    with pytest.raises(Fault, match=r"a stage of 0 tokens: at least 1"):
        rate(rewarm.Settings(1.0), 0, stage_tokens=0)
