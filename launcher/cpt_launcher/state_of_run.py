"""Where a run is, from the events of its folder, whether anybody is at work on it, and what SLURM says of its job.

queued     submitted or requeued, and not started yet           finished   its marker is there
starting   started, before its first step                       stopped    asked to stop
running    training now                                         failed     it said why, or its supervisor did
waiting    failed, and its supervisor will start it again       died       started, and gone without a word
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpt.observe.attempts import FINISHED, STOPPED
from cpt_launcher.slurm import Job
from cpt_launcher.verdict import CANNOT_WORK, ended_told

GOES_ON = "the same command goes on from the newest checkpoint"
MEND = "mend what it says first; the same command would end in the same way"
_LATE_SECONDS = 60.0  # after the end of a pause, in which a supervisor starts the next attempt


@dataclass(frozen=True)
class Facts:
    """What was found. `is_taken`: a process trains in the folder; `job`: of the newest attempt, as far as SLURM knows
    it, and `was_asked` whether SLURM could say so; `now`: the time of day.
    """

    events: Sequence[dict[str, Any]]
    now: float
    is_finished: bool = False
    is_taken: bool = False
    has_stop_file: bool = False
    job: Job | None = None
    was_asked: bool = False


@dataclass(frozen=True)
class Where:
    """The state, why in a line, and what to do next; None where there is nothing to say."""

    state: str
    reason: str | None = None
    advice: str | None = None


def newest_attempt(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the newest attempt, from where it was submitted, requeued or started, whatever is told first."""
    group: list[dict[str, Any]] = []
    for event in events:
        is_second = event["event"] == "started" and any(one["event"] in ("started", "left") for one in group)
        # A job may have begun before it was noted that it was submitted.
        is_late = event["event"] == "submitted" and any(one.get("job") == event.get("job") for one in group)
        if is_second or (event["event"] in ("submitted", "requeued", "launched") and not is_late):
            group = []
        group.append(event)
    return group


def where(facts: Facts) -> Where:
    """What the facts come to."""
    if facts.is_finished:
        return Where("finished")
    attempt = newest_attempt(facts.events)
    last = {event["event"]: event for event in attempt}
    if facts.is_taken or (facts.job is not None and facts.job.is_running):
        return _at_work(facts, last)
    if facts.job is not None and facts.job.is_waiting:
        told = f"job {facts.job.id} waits: {facts.job.reason or facts.job.state}"
        if "requeued" in last:
            told += f"; it was requeued: {last['requeued'].get('reason')}"
        return Where("queued", told)
    if "left" in last:
        return _of_supervisor(last["left"], last.get("ended"))
    if "restarting" in last and not _is_over(last["restarting"], facts.now):
        return _paused(last["restarting"])
    if "ended" in last:
        return _of_end(last["ended"])
    return _without_a_word(facts, last)


def num_failures(events: Sequence[dict[str, Any]]) -> int:
    """Attempts that failed, or that another one had to follow though they had not ended."""
    failures, is_open = 0, False
    for event in events:
        if event["event"] == "started":
            failures += is_open
            is_open = True
        elif event["event"] == "ended":
            failures += event.get("how") not in (STOPPED, FINISHED)
            is_open = False
    return failures


def _at_work(facts: Facts, last: dict[str, dict[str, Any]]) -> Where:
    if "restarting" in last and not facts.is_taken:
        return _paused(last["restarting"])
    if "ended" in last:
        told = ended_told(last["ended"])
        return Where("running", f"ending: {told}" if told else "ending")
    if facts.has_stop_file:
        return Where("running", "asked to stop by the file stop; it saves after its step, and ends")
    return Where("running" if "training" in last or not facts.events else "starting")


def _of_supervisor(left: dict[str, Any], ended: dict[str, Any] | None) -> Where:
    """A supervisor has ended and said why."""
    reason = left.get("reason") or "its supervisor did not say why"
    if left["status"] > 128:
        return Where("stopped", reason, GOES_ON)
    if left["status"] == CANNOT_WORK or (ended or {}).get("is_final"):
        return Where("failed", reason, MEND)
    return Where("failed", reason, f"when the reason is gone, {GOES_ON}")


def _of_end(ended: dict[str, Any]) -> Where:
    """The run has said how it ended, and nobody starts it again."""
    if ended.get("how") in (STOPPED, FINISHED):
        told = ended_told(ended) or f"asked to stop by signal {ended.get('signal') or '?'}; it has saved"
        return Where("stopped", told, GOES_ON)
    return Where("failed", ended_told(ended) or "it did not say why", MEND if ended.get("is_final") else GOES_ON)


def _paused(restarting: dict[str, Any]) -> Where:
    told = f"failed {restarting['failures']} time(s) without a newer checkpoint: {restarting['reason']}"
    return Where("waiting", told, f"it is started again {restarting['after_seconds']:.0f} s after that")


def _is_over(restarting: dict[str, Any], now: float) -> bool:
    return now > restarting["time"] + restarting["after_seconds"] + _LATE_SECONDS


def _without_a_word(facts: Facts, last: dict[str, dict[str, Any]]) -> Where:
    """Nobody is at work, and nobody said how it came to that."""
    of_job = f"; job {facts.job.id} is {facts.job.state}" if facts.job is not None else ""
    if not facts.events:
        return Where("stopped", "when it was started and how it ended was not noted", GOES_ON)
    if "started" in last or "launched" in last:
        told = f"started and never ended, and nobody is at work on it: killed, or its machine is gone{of_job}"
        return Where("died", told, GOES_ON)
    if facts.job is not None:  # over before it began
        how = "stopped" if facts.job.state.startswith("CANCELLED") else "failed"
        return Where(how, f"job {facts.job.id} is {facts.job.state}, and started nothing", "submit it again")
    if facts.was_asked:
        return Where("died", "it was submitted and started nothing, and SLURM knows its job no more", "submit it again")
    return Where("queued", "submitted, and not started so far as its folder tells")
