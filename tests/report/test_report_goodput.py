"""The hours of a run add up to its wall time, each under its cause; every figure here was worked by hand."""

from __future__ import annotations

import pytest

from cpt.report.goodput import CAUSES, goodput


def at(time: float, event: str, **fields) -> dict:
    return {"event": event, "time": float(time), **fields}


def step(number: int, seconds: float = 2.0, **more) -> dict:
    return {"step": number, "step_seconds": seconds, "skipped": 0, **more}


def score(number: int, seconds: float) -> dict:
    return {"step": number, "source": "prose", "evaluation_seconds": seconds}


def seconds_by_cause(account) -> dict[str, float]:
    """Those that are not 0, after a look that all add up."""
    assert sum(account.seconds.values()) == pytest.approx(account.wall_seconds)
    assert list(account.seconds) == list(CAUSES)
    return {cause: round(seconds, 6) for cause, seconds in account.seconds.items() if abs(seconds) > 1e-9}


QUIET = [
    at(1000, "submitted", job="7"),
    at(1100, "started", step=0, job="7"),
    at(1130, "training", step=0),
    at(1161, "saved_last", step=10, seconds=3.0),
    at(1162, "ended", how="finished", step=10),
]
SCORES = [score(0, 4.0), score(10, 5.0)]


def test_a_run_that_nothing_disturbs_is_told_by_cause():
    metrics = [step(number) for number in range(1, 10)] + [step(10, save_seconds=1.5)]
    account = goodput(QUIET, metrics, SCORES)
    # From 1130 to 1162: 20 of steps, 5 of the evaluation at their end, 1.5 and 3 of saves; 2.5 nobody tells.
    assert seconds_by_cause(account) == {
        "queue": 100.0, "start": 26.0, "training": 20.0, "evaluation": 9.0, "save": 4.5, "other": 2.5,
    }  # fmt: skip
    assert (account.wall_seconds, account.attempts, account.lost_steps) == (162.0, 1, 0)
    assert account.share == pytest.approx(20 / 162)


def test_of_an_attempt_that_was_killed_the_time_after_its_last_step_is_down_time():
    events = [
        at(0, "started", step=0),
        at(10, "training", step=0),
        at(100, "started", step=6),
        at(103, "resumed_over", steps=3, seconds=7.0),
        at(120, "training", step=6),
        at(130, "ended", how="finished", step=10),
    ]
    account = goodput(events, [step(number) for number in range(1, 11)], [])
    # 6 steps stand and 3 were lost: it ended at 10 + 12 + 7 = 29, and 71 s went by until the next start.
    assert seconds_by_cause(account) == {"start": 30.0, "training": 20.0, "lost": 7.0, "down": 71.0, "other": 2.0}
    assert (account.attempts, account.lost_steps) == (2, 3)


def test_a_job_that_is_queued_again_waits_in_the_queue_from_then_on():
    events = [
        at(0, "submitted", job="7"),
        at(5, "started", step=0, job="7"),
        at(6, "training", step=0),
        at(10, "ended", how="stopped", step=2),
        at(12, "requeued", reason="time limit"),
        at(52, "started", step=2, job="7"),
        at(53, "training", step=2),
        at(57, "ended", how="finished", step=4),
    ]
    account = goodput(events, [step(number) for number in range(1, 5)], [])
    assert seconds_by_cause(account) == {"queue": 45.0, "start": 2.0, "training": 8.0, "down": 2.0}


def test_the_next_job_of_a_chain_has_waited_in_the_queue_since_the_one_before_ended():
    events = [
        at(0, "submitted", job="7"),
        at(0, "submitted", job="8"),
        at(5, "started", step=0, job="7"),
        at(5, "training", step=0),
        at(9, "ended", how="stopped", step=2),
        at(29, "started", step=2, job="8"),
        at(29, "training", step=2),
        at(33, "ended", how="finished", step=4),
    ]
    account = goodput(events, [step(number) for number in range(1, 5)], [])
    assert seconds_by_cause(account) == {"queue": 25.0, "training": 8.0}


def test_an_attempt_begins_with_its_process_and_not_before_the_one_before_ended():
    events = [
        at(100, "started", step=0, prepared_seconds=30.0),
        at(101, "training", step=0),
        at(105, "ended", how="stopped", step=2),
        at(120, "started", step=2, prepared_seconds=10.0),
        at(121, "training", step=2),
        at(123, "ended", how="stopped", step=3),
        at(130, "started", step=3, prepared_seconds=500.0),
        at(131, "training", step=3),
        at(133, "ended", how="finished", step=4),
    ]
    account = goodput(events, [step(number) for number in range(1, 5)], [])
    assert seconds_by_cause(account) == {"start": 31.0 + 11.0 + 8.0, "training": 8.0, "down": 5.0}


def test_an_attempt_that_could_not_start_takes_none_of_the_time_of_the_one_before():
    events = [
        at(0, "started", step=0),
        at(1, "training", step=0),
        at(3, "ended", how="failed", step=1),
        at(9, "ended", how="failed", has_started=False),
        at(20, "started", step=0),
        at(21, "training", step=0),
        at(23, "ended", how="finished", step=1),
    ]
    assert seconds_by_cause(goodput(events, [step(1)], []))["down"] == 17.0


def test_a_restart_in_place_is_down_time_and_no_time_in_the_queue():
    events = [
        at(0, "submitted", job="7"),
        at(5, "started", step=0, job="7"),
        at(6, "ended", how="failed", step=0),
        at(6, "restarting", after_seconds=10),
        at(20, "started", step=0, job="7"),
        at(21, "training", step=0),
        at(25, "ended", how="finished", step=2),
    ]
    account = goodput(events, [step(1), step(2)], [])
    assert seconds_by_cause(account) == {"queue": 5.0, "start": 2.0, "training": 4.0, "down": 14.0}
    assert account.attempts == 2


def test_steps_left_out_and_steps_gone_back_over_are_lost():
    events = [
        at(0, "started", step=0),
        at(0, "training", step=0),
        at(9, "rewound", step_from=5, step_to=2, seconds=6.5),
        at(20, "ended", how="finished", step=5),
    ]
    passed_over = {**step(3, 0.5), "skipped": 1, "tokens_per_second": 0.0}
    metrics = [step(1), step(2), passed_over, {**step(4), "skipped": 1, "tokens_per_second": 50.0}, step(5)]
    account = goodput(events, metrics, [])
    assert seconds_by_cause(account) == {"training": 6.0, "lost": 9.0, "other": 5.0}
    assert account.lost_steps == 4  # three gone back over, one made and left out


def test_a_run_that_is_still_training_is_told_up_to_its_last_step():
    account = goodput(QUIET[:3], [step(1), step(2)], SCORES[:1])
    assert account.wall_seconds == 134.0
    assert seconds_by_cause(account) == {"queue": 100.0, "start": 26.0, "training": 4.0, "evaluation": 4.0}


def test_steps_from_before_starts_were_noted_are_left_out():
    events = [at(50, "started", step=3), at(51, "training", step=3), at(55, "ended", how="finished", step=5)]
    account = goodput(events, [step(number) for number in range(1, 6)], [score(0, 9.0), score(5, 0.0)])
    assert seconds_by_cause(account) == {"start": 1.0, "training": 4.0}


@pytest.mark.parametrize("events", [[], [at(1, "submitted", job="7")]], ids=["no file", "only submitted"])
def test_a_run_of_which_no_start_was_noted_has_no_account(events):
    assert goodput(events, [step(1)], []) is None


def test_an_attempt_that_failed_before_its_first_step_was_start_alone():
    events = [at(0, "started", step=0), at(7, "ended", how="failed"), at(7, "restarting"), at(9, "started", step=0)]
    assert seconds_by_cause(goodput(events, [], [])) == {"start": 7.0, "down": 2.0}
