"""Learning rates against numbers worked out by hand; each a pure function of progress."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import Fault, Length, as_mapping, build, names_of_choices, read_settings
from cpt.config.choices import settings_of_choice
from cpt.progress import Progress
from cpt.schedules import autoregressive, branch, constant, cosine, infinite, inverse_sqrt, linear, rewarm, wsd

EXACT = 1e-12


def rate(settings, tokens: int, stage_tokens: int = 1000, rate_before: float = 0.0) -> float:
    return build(settings, "Schedule", stage_tokens, rate_before).rate(Progress(stage_tokens=tokens))


def close(value: float):
    return pytest.approx(value, abs=EXACT, rel=0)


# The 405M model of Ibrahim et al. 2024: warm-up 1,324 steps of 2,260,992 tokens, 132,366 steps in all.
STEP, WARMUP, STEPS = 2_260_992, 1_324, 132_366
OF_405M = cosine.Settings(peak=3e-4, floor=3e-5, warmup=Length(WARMUP * STEP))


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
    settings = constant.Settings(2.0, warmup=Length(8))
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
    settings = rewarm.Settings(2.0, 0.4, warmup=Length(share=Fraction(1, 10)))
    assert [rate(settings, tokens, 1000, rate_before) for tokens in (0, 1, 50, 99)] == [close(e) for e in expected]


@pytest.mark.parametrize("rate_before", [0.0, 0.5, 3.0])
def test_a_rewarm_decays_alike_whatever_came_before(rate_before):
    settings = rewarm.Settings(2.0, 0.4, warmup=Length(share=Fraction(1, 10)))
    values = [rate(settings, tokens, 1000, rate_before) for tokens in (100, 325, 550, 775, 1000)]
    half = 0.8 * math.sqrt(0.5)
    assert values == [close(value) for value in (2.0, 1.2 + half, 1.2, 1.2 - half, 0.4)]


def test_a_rewarm_without_a_warm_up_begins_at_the_peak():
    assert rate(rewarm.Settings(2.0, warmup=Length()), 0, 1000, 0.5) == 2.0


def test_a_rewarm_rises_over_one_hundredth_of_the_stage_unless_told():
    settings = rewarm.Settings(1.0)
    assert rate(settings, 5, 1000) == close(0.5)
    assert rate(settings, 10, 1000) == close(1.0)


def test_a_warm_up_of_a_part_of_a_token_is_none():
    assert rate(rewarm.Settings(1.0), 1, 3) == close(0.5 + 0.5 * math.cos(math.pi * (1 - 0.03) / (3 - 0.03)))


EXAMPLES = {
    "autoregressive": {"peak": 2.0, "floor": 0.1},
    "branch": {"floor": 0.1},
    "constant": {"peak": 2.0, "warmup": 30},
    "cosine": {"peak": 2.0, "floor": 0.1, "warmup": 30},
    "infinite": {"peak": 2.0, "constant": 1.0, "floor": 0.1, "anneal": 100},
    "rewarm": {"peak": 2.0, "floor": 0.1},
    "wsd": {"peak": 2.0, "floor": 0.1, "decay": 200},
}


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
        rates = {schedule.rate(Progress(step, 7 * step, 3, step, tokens)) for step in (0, 1, 100)}
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
        ("constant", {"peak": 1, "warmup": -1}, ["warmup = -1: at least 0"]),
        ("constant", {"peak": 1, "warmup": "150%"}, ["warmup = 150%: a share of the stage, at most 100%"]),
        ("cosine", {"peak": 1, "floor": 2}, ["floor = 2.0, peak = 1.0: 0 <= floor <= peak, and peak above 0"]),
        ("cosine", {"peak": 0}, ["floor = 0.0, peak = 0.0: 0 <= floor <= peak, and peak above 0"]),
        ("cosine", {"peak": 1, "warmup": -1}, ["warmup = -1: at least 0"]),
        ("linear", {"peak": 1, "floor": 2}, ["floor = 2.0, peak = 1.0: 0 <= floor <= peak, and peak above 0"]),
        ("rewarm", {}, ["peak is not set: the rate to rise to; or rewarm: none, to go down from the last one"]),
        ("rewarm", {"peak": 1, "rewarm": 2}, [
            "rewarm = 2.0: none, peak, or a share of the peak, above 0 and at most 1"]),
        ("infinite", {"peak": 1, "constant": 2}, [
            "floor = 0.0, constant = 2.0, peak = 1.0: 0 <= floor <= constant <= peak, and constant above 0"]),
        ("infinite", {"peak": 2, "constant": 1, "anneal": "1%", "steepness": 0}, [
            "floor = 0.0: annealing is exponential and never gets there; above 0, such as constant / 10",
            "steepness = 0.0: above 0"]),
        ("wsd", {"peak": 1, "half_life": 5}, ["half_life: shape = 1-sqrt has none; use exponential, or leave it out"]),
        ("wsd", {"peak": 1, "shape": "exponential"}, [
            "floor = 0.0: an exponential decay never gets there; above 0, or tell half_life"]),
        ("wsd", {"peak": 1, "shape": "exponential", "half_life": 0}, ["half_life = 0: above 0"]),
        ("inverse_sqrt", {"peak": 1, "warmup": 0}, ["warmup = 0: the rate falls as sqrt(warmup / tokens); above 0"]),
        ("autoregressive", {"peak": 1, "rounds_before": -1}, ["rounds_before = -1: at least 0"]),
        ("branch", {"floor": -1}, ["floor = -1.0: at least 0"]),
        ("branch", {"shape": "exponential"}, ["floor = 0.0: an exponential decay never gets there; above 0"]),
        ("rewarm", {"peak": 1, "floor": -1}, ["floor = -1.0, peak = 1.0: 0 <= floor <= peak, and peak above 0"]),
        ("rewarm", {"peak": -1, "warmup": "-1%"}, [
            "warmup = -0.01: at least 0",
            "floor = 0.0, peak = -1.0: 0 <= floor <= peak, and peak above 0",
        ]),
    ],
)  # fmt: skip
def test_settings_that_make_no_schedule_are_faults(name, given_settings, lines):
    with pytest.raises(Fault) as caught:
        read_settings(settings_of_choice("cpt.schedules", name), given_settings)
    assert list(caught.value.lines) == lines


def test_stretches_that_are_longer_than_the_stage_are_told_together():
    with pytest.raises(Fault) as caught:
        rate(cosine.Settings(1.0, warmup=Length(1001)), 0)
    assert str(caught.value) == "schedule.warmup = 1001: 1,001 tokens, the stage has 1,000; make them shorter"
    with pytest.raises(Fault) as caught:
        rate(wsd.Settings(1.0, warmup=Length(share=Fraction(1, 2)), decay=Length(600)), 0)
    assert str(caught.value) == (
        "schedule.warmup = 0.5 + schedule.decay = 600: 1,100 tokens, the stage has 1,000; make them shorter"
    )


def test_a_stage_of_no_tokens_is_a_fault():
    with pytest.raises(Fault, match=r"a stage of 0 tokens: at least 1"):
        rate(rewarm.Settings(1.0), 0, stage_tokens=0)


def test_a_line_goes_down_straight():
    settings = linear.Settings(2.0, 0.5, warmup=Length(200))
    assert [rate(settings, tokens) for tokens in (0, 100, 200, 600, 1000, 2000)] == [0.0, 1.0, 2.0, 1.25, 0.5, 0.5]


def test_no_rewarm_begins_at_the_parents_rate_and_goes_down():
    settings = rewarm.Settings(rewarm="none", floor=0.1)
    assert [rate(settings, tokens, 1000, 0.5) for tokens in (0, 500, 1000)] == [0.5, close(0.3), 0.1]
    assert rate(settings, 250, 1000, 0.5) == close(0.3 + 0.2 * math.sqrt(0.5))
    for before in (0.0, 0.05):
        with pytest.raises(Fault, match=f"the last rate before is {before:g}, to go down to 0.1 from;"):
            rate(settings, 0, 1000, before)


def test_a_rewarm_to_a_share_of_the_peak_rises_to_that():
    settings = rewarm.Settings(2.0, 0.1, Length(100), Fraction(1, 4))
    assert [rate(settings, tokens, 1100, 0.1) for tokens in (0, 50, 100, 600, 1100)] == [
        close(value) for value in (0.1, 0.3, 0.5, 0.3, 0.1)
    ]


# The infinite schedule of the 405M model: constant rate 1.65e-4, cool-down over 60 % of the tokens.
INFINITE = infinite.Settings(3e-4, 1.65e-4, 3e-5, Length(1000), Length(6000), Length(1000))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (500, 1.5e-4),
        (1000, 3e-4),
        (4000, 2.325e-4),  # half of the way of a cosine is half of the way
        (2500, 1.65e-4 + 0.675e-4 * (1 + 2**-0.5)),
        (7000, 1.65e-4),
        (9000, 1.65e-4),
        (9500, 1.65e-4 * (3e-5 / 1.65e-4) ** 0.5),  # 7.0356e-5, the geometric mean
        (10000, 3e-5),
        (20000, 3e-5),
    ],
)
def test_an_infinite_schedule_rises_cools_down_stays_and_anneals(tokens, expected):
    assert rate(INFINITE, tokens, 10000) == close(expected)


def test_an_infinite_schedule_cools_down_as_an_inverse_root_too():
    settings = dataclasses.replace(INFINITE, curve="inverse_sqrt", steepness=8.0)
    # h(x) = 1 / sqrt(1 + 8x) - 1: h(1) = -2/3, h(3/8) = -1/2: three quarters of the way are behind after three eighths.
    assert rate(settings, 1000 + 2250, 10000) == close(3e-4 - 0.75 * 1.35e-4)
    assert [rate(settings, tokens, 10000) for tokens in (1000, 7000)] == [close(3e-4), close(1.65e-4)]


def test_an_infinite_schedule_goes_on_at_its_constant_rate_for_ever_and_is_annealed_whenever():
    going_on = dataclasses.replace(INFINITE, warmup=Length(), cooldown=Length(), anneal=Length())
    assert {rate(going_on, tokens, 100, 1.65e-4) for tokens in (0, 1, 99, 100, 10**9)} == {1.65e-4}
    release = dataclasses.replace(going_on, anneal=Length(share=Fraction(1)))
    assert [rate(release, tokens, 100, 1.65e-4) for tokens in (0, 100)] == [1.65e-4, close(3e-5)]
    assert rate(release, 25, 100, 1.65e-4) == close(1.65e-4 * (3e-5 / 1.65e-4) ** 0.25)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [2.0, 1.75, 1.25, 0.5]), ("1-sqrt", [2.0, 1.387627564304205, 0.9393398282201787, 0.5]),
     ("exponential", [2.0, 2.0 * 4 ** -(1 / 6), 1.0, 0.5])],
)  # fmt: skip
def test_wsd_stays_at_the_peak_and_decays_over_the_last_tokens(shape, expected):
    """1-sqrt: 0.5 + 1.5 x (1 - sqrt(1/6)) and 0.5 + 1.5 x (1 - sqrt(1/2))."""
    settings = wsd.Settings(2.0, 0.5, Length(100), Length(300), shape)
    assert [rate(settings, tokens) for tokens in (50, 100, 400, 700)] == [1.0, 2.0, 2.0, 2.0]
    places = (700, 750, 850, 1000)
    assert [rate(settings, tokens) for tokens in places] == [close(value) for value in expected]
    assert rate(settings, 5000) == close(0.5)


def test_wsd_with_a_half_life_halves_in_it_and_stops_at_the_floor():
    settings = wsd.Settings(2.0, 0.3, Length(), Length(400), "exponential", half_life=Length(100))
    assert [rate(settings, tokens) for tokens in (600, 650, 700, 800, 900, 5000)] == [
        close(value) for value in (2.0, 2**0.5, 1.0, 0.5, 0.3, 0.3)
    ]


def test_an_inverse_root_falls_as_one_over_the_root_and_cools_down_straight():
    settings = inverse_sqrt.Settings(2.0, 0.2, warmup=Length(100), cooldown=Length(200))
    assert [rate(settings, tokens, 1100) for tokens in (0, 50, 100, 400, 900)] == [
        close(value) for value in (0.0, 1.0, 2.0, 0.2 + 1.8 / 2, 0.2 + 1.8 / 3)
    ]
    assert [rate(settings, tokens, 1100) for tokens in (1000, 1100, 9999)] == [close(0.5), close(0.2), close(0.2)]
    endless = inverse_sqrt.Settings(2.0, warmup=Length(100))
    assert rate(endless, 10_000, 1100) == close(0.2)


@pytest.mark.parametrize(
    ("num_before", "expected"), enumerate([3.00e-4, 1.65e-4, 0.975e-4, 0.695e-4, 0.558e-4, 0.481e-4])
)
def test_the_peaks_of_an_autoregressive_schedule_are_those_of_the_paper(num_before, expected):
    settings = autoregressive.Settings(3e-4, 3e-5, warmup=Length(50))
    in_run = build(settings, "Schedule", 1887, 0.0).rate(Progress(stage=num_before, stage_tokens=50))
    later = build(dataclasses.replace(settings, rounds_before=num_before), "Schedule", 1887, 0.0)
    assert in_run == later.rate(Progress(stage_tokens=50)) == pytest.approx(expected, abs=0.5e-7)
    assert later.rate(Progress(stage_tokens=25)) == close(in_run / 2)
    assert later.rate(Progress(stage_tokens=1887)) == 3e-5


def test_the_peak_of_the_third_round_is_worked_out_by_hand():
    # Two thirds of the way: 3e-5 + 1.35e-4 x (1 + cos(120 degrees)) = 3e-5 + 1.35e-4 / 2
    settings = autoregressive.Settings(3e-4, 3e-5, warmup=Length(), rounds_before=2)
    assert rate(settings, 0) == close(9.75e-5)


@pytest.mark.parametrize(
    ("shape", "half"), [("cosine", 1.05), ("linear", 1.05), ("1-sqrt", 0.1 + 1.9 * (1 - 0.5**0.5)),
                        ("exponential", (2.0 * 0.1) ** 0.5)],
)  # fmt: skip
def test_a_branch_goes_from_the_paths_rate_all_the_way_down(shape, half):
    settings = branch.Settings(0.1, shape)
    assert [rate(settings, tokens, 1000, 2.0) for tokens in (0, 500, 1000, 2000)] == [
        close(value) for value in (2.0, half, 0.1, 0.1)
    ]
    with pytest.raises(Fault, match="schedule.floor = 0.1: the branch begins at 0.1, the last rate of the path"):
        rate(settings, 0, 1000, 0.1)


@pytest.mark.parametrize(
    ("told", "tokens", "plain"),
    [("1%", 10.0, 0.01), (0.25, 250.0, 0.25), ("100%", 1000.0, "100%"), ("1/3", 1000 / 3, "100/3%"),
     ("20K", 20000.0, 20000), (7, 7.0, 7), (0, 0.0, 0), (1, 1.0, 1)],
)  # fmt: skip
def test_a_length_is_a_share_or_tokens_and_is_written_as_it_reads(told, tokens, plain):
    settings = read_settings(constant.Settings, {"peak": 1, "warmup": told})
    assert settings.warmup.tokens_of(1000) == tokens
    assert as_mapping(settings)["warmup"] == plain
    assert read_settings(constant.Settings, as_mapping(settings)) == settings


@pytest.mark.parametrize("told", ["much", 1.5, True, "x%", [1]])
def test_what_is_no_length_is_told(told):
    with pytest.raises(Fault, match="expected a share such as 1%, or tokens such as 20M"):
        read_settings(constant.Settings, {"peak": 1, "warmup": told})
