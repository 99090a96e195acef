"""Where a run is follows from its events, from who is at work on it, and from what SLURM says of its job."""

from __future__ import annotations

import pytest

from cpt_launcher.slurm import Job, job_of_line
from cpt_launcher.state_of_run import GOES_ON, MEND, Facts, newest_attempt, num_failures, where

NOW = 1000.0


def event(name: str, **more: object) -> dict[str, object]:
    return {"event": name, "time": NOW, **more}


def job(state: str, reason: str | None = None) -> Job:
    return Job("7", state, reason, "n[1-2]")


SUBMITTED, LAUNCHED = event("submitted", job="7"), event("launched", step=0, by="job 7", job="7")
STARTED, TRAINING = event("started", step=0), event("training", step=0)
STOPPED = event("ended", how="stopped", signal=10, step=5)
FAILED = event("ended", how="failed", reason="no sign of life", rank=3, node="n2")
FINAL = event("ended", how="failed", reason="loss nan", is_final=True)
RESTARTING = event("restarting", after_seconds=20.0, failures=2, reason="fire")
GAVE_UP = event("left", status=1, reason="4 failure(s)")
RUNNING = [SUBMITTED, LAUNCHED, STARTED, TRAINING]
STARTED_HERE, STARTED_THERE = event("started", nodes=["here", "there"]), event("started", nodes=["there", "here"])
CHAINED = event("submitted", job="7", chain=["7", "8"])
REQUEUED = event("requeued", job="7", reason="asked to stop by SIGUSR1")
HERE, FRESH = {"host": "here"}, {"seconds_since_sign": 3.0, "sign_seconds": 900.0}


@pytest.mark.parametrize("number", range(1, len(RUNNING) + 1))
@pytest.mark.parametrize("before", [[], [*RUNNING, STOPPED, REQUEUED]], ids=["submitted", "requeued"])
def test_whether_a_job_is_at_work_is_not_known_without_slurm(before, number):
    found = where(Facts([*before, *(RUNNING[:number] if not before else RUNNING[1:number])], NOW, **HERE))
    assert found.state == "unknown" and "SLURM could not be asked" in found.reason
    assert found.advice == "ask again when SLURM answers, before anything is started again"


@pytest.mark.parametrize(
    ("events", "more", "told"),
    [
        ([*RUNNING, FAILED], {}, "ended: no sign of life (rank 3 node n2); whether it is started again, SLURM"),
        ([*RUNNING, FAILED, {**RESTARTING, "time": NOW - 100}], {}, "whether it is started again"),
        (RUNNING, {"job": job("FAILED")}, "SLURM could not be asked"),  # about the next job of the chain
        ([CHAINED, *RUNNING[1:], GAVE_UP], {}, "ended: 4 failure(s); whether it is started again"),
        ([STARTED_THERE, TRAINING], {}, "only on there"),
        ([STARTED_THERE, TRAINING], {**FRESH, "seconds_since_sign": 7200.0}, "changed 2h00m ago"),
        (RUNNING, {"was_asked": True, **FRESH}, "changed 3s ago"),  # SLURM knows the job no more
        ([STARTED_HERE, TRAINING], {"is_taken": None, **FRESH}, "changed 3s ago"),  # a file system without locks
    ],
)
def test_what_may_be_at_work_where_nobody_could_be_asked_is_not_called_dead(events, more, told):
    found = where(Facts(events, NOW, **HERE, **more))
    assert found.state == "unknown" and told in found.reason and found.advice.startswith("ask again ")


@pytest.mark.parametrize(
    ("events", "more", "state"),
    [
        (RUNNING, {"is_finished": True}, "finished"),
        ([SUBMITTED], {"job": job("PENDING", "Priority")}, "queued"),
        ([event("submitted")], {}, "queued"),  # without a number
        ([SUBMITTED], {"was_asked": True}, "died"),
        ([SUBMITTED], {"job": job("CANCELLED"), "was_asked": True}, "stopped"),
        ([SUBMITTED], {"job": job("FAILED"), "was_asked": True}, "failed"),
        ([SUBMITTED, LAUNCHED], {"job": job("RUNNING")}, "starting"),
        ([SUBMITTED, LAUNCHED, STARTED], {"job": job("RUNNING")}, "starting"),
        (RUNNING, {"job": job("RUNNING")}, "running"),
        ([STARTED, TRAINING], {"is_taken": True}, "running"),
        ([], {"is_taken": True}, "running"),  # of a release that noted nothing
        ([], {}, "stopped"),
        ([*RUNNING, STOPPED], {"was_asked": True}, "stopped"),
        ([*RUNNING, STOPPED], {"job": job("RUNNING")}, "running"),  # it ends
        (
            [*RUNNING, STOPPED, event("requeued", job="7", reason="USR1")],
            {"job": job("PENDING", "BeginTime")},
            "queued",
        ),
        ([*RUNNING, FAILED, RESTARTING], {"job": job("RUNNING")}, "waiting"),
        ([*RUNNING, FAILED, RESTARTING], {}, "waiting"),
        (
            [*RUNNING, FAILED, {**RESTARTING, "time": NOW - 100}],
            {"was_asked": True},
            "failed",
        ),  # nobody started it again
        ([*RUNNING, FAILED, RESTARTING, LAUNCHED], {"job": job("RUNNING")}, "starting"),
        ([*RUNNING, FAILED, GAVE_UP], {}, "failed"),
        ([*RUNNING, FAILED, GAVE_UP, STARTED, TRAINING], {"is_taken": True}, "running"),  # by hand, since then
        ([*RUNNING, STOPPED, event("left", status=143, reason="TERM")], {}, "stopped"),
        ([*RUNNING, FAILED], {"was_asked": True}, "failed"),
        ([STARTED, TRAINING, FAILED], {}, "failed"),
        ([event("started", job="7"), TRAINING, FAILED], {}, "failed"),  # nobody starts it again
        (RUNNING, {"was_asked": True}, "died"),
        ([STARTED_HERE, TRAINING], HERE, "died"),
        ([STARTED_HERE, TRAINING], {**HERE, **FRESH}, "died"),  # just now: the lock of this machine is free
        (RUNNING, {"job": job("NODE_FAIL"), "was_asked": True}, "died"),
        ([SUBMITTED, LAUNCHED], {"job": job("FAILED"), "was_asked": True}, "died"),
    ],
)
def test_the_state_of_a_run(events, more, state):
    assert where(Facts(events, NOW, **more)).state == state


def test_a_failure_names_rank_and_node_and_says_that_the_same_command_goes_on():
    found = where(Facts([*RUNNING, FAILED], NOW, was_asked=True))
    assert (found.reason, found.advice) == ("no sign of life (rank 3 node n2)", GOES_ON)


@pytest.mark.parametrize("events", [[FINAL], [FINAL, GAVE_UP], [event("left", status=2, reason="sed")]])
def test_what_would_end_in_the_same_way_is_to_be_mended_first(events):
    assert where(Facts([*RUNNING, *events], NOW, was_asked=True)).advice == MEND


def test_a_queued_job_says_why_it_waits_and_why_it_was_requeued():
    events = [*RUNNING, STOPPED, event("requeued", job="7", reason="asked to stop by SIGUSR1")]
    told = where(Facts(events, NOW, job=job("PENDING", "BeginTime"))).reason
    assert told == "job 7 waits: BeginTime; it was requeued: asked to stop by SIGUSR1"


def test_a_death_says_what_slurm_says_of_the_job():
    assert "job 7 is OUT_OF_MEMORY" in where(Facts(RUNNING, NOW, job=job("OUT_OF_MEMORY"), was_asked=True)).reason


def test_a_stop_that_is_asked_for_is_told_while_the_run_saves():
    assert "file stop" in where(Facts(RUNNING, NOW, is_taken=True, has_stop_file=True)).reason


def test_the_newest_attempt_begins_where_it_was_submitted_requeued_launched_or_started_by_hand():
    assert newest_attempt([*RUNNING, FAILED, RESTARTING, LAUNCHED, STARTED]) == [LAUNCHED, STARTED]
    assert newest_attempt([STARTED, FAILED, STARTED, TRAINING]) == [STARTED, TRAINING]
    assert newest_attempt([{**LAUNCHED, "job": "7"}, SUBMITTED, STARTED])[0]["event"] == "launched"  # noted late
    assert newest_attempt([*RUNNING, FAILED]) == [LAUNCHED, STARTED, TRAINING, FAILED]


def test_failures_are_those_that_said_so_and_those_that_could_not():
    assert num_failures([STARTED, FAILED, STARTED, STARTED, STOPPED, STARTED]) == 2


def test_a_line_of_scontrol_is_read():
    line = "JobId=7 JobName=a b UserId=me(1) JobState=PENDING Reason=Resources NodeList=(null) StartTime=Unknown"
    assert job_of_line("7", line) == Job("7", "PENDING", "Resources", None)


REFUSED = event("ended", how="failed", reason="another process is training there", has_started=False)


def test_who_could_not_start_does_not_end_the_one_that_is_at_work():
    assert where(Facts([*RUNNING, REFUSED], NOW, is_taken=True, **HERE)).state == "running"
    assert num_failures([*RUNNING, REFUSED]) == 0


def test_why_an_attempt_could_not_start_is_told():
    left = event("left", status=1, reason="4 failure(s) without a newer checkpoint, the last one: no ranks")
    found = where(Facts([SUBMITTED, LAUNCHED, REFUSED], NOW, was_asked=True, **HERE))
    assert (found.state, found.reason) == ("failed", "another process is training there")
    assert where(Facts([SUBMITTED, LAUNCHED, REFUSED, left], NOW, was_asked=True, **HERE)).reason == left["reason"]
