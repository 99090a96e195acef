"""Where a run is, from the events of its folder, whether anybody is at work on it, and what SLURM says of its job.

queued     submitted or requeued, and not started yet           finished   its marker is there
starting   started, before its first step                       stopped    asked to stop
running    training now                                         failed     it said why, or its supervisor did
waiting    failed, and its supervisor will start it again       died       started, and gone without a word
unknown    it may be at work where nobody could be asked: SLURM does not answer, or another machine's locks are not seen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpt.observe.attempts import FINISHED, STOPPED, is_of_started
from cpt.observe.speed import as_duration
from cpt_launcher.slurm import Job
from cpt_launcher.verdict import CANNOT_WORK, ended_told

GOES_ON = "the same command goes on from the newest checkpoint"
MEND = "mend what it says first; the same command would end in the same way"
_LATE_SECONDS = 60.0  # after the end of a pause, in which a supervisor starts the next attempt


@dataclass(frozen=True)
class Facts:
    """What was found. `is_taken`: a process trains in the folder, None where there are no locks; `job`: of the newest
    attempt, as far as SLURM knows it, and `was_asked` whether SLURM could say so; `host`: this machine's name; `now`:
    the time of day. `seconds_since_sign`: since metrics or logs changed: one of life for less than `sign_seconds`.
    """

    events: Sequence[dict[str, Any]]
    now: float
    is_finished: bool = False
    is_taken: bool | None = False
    has_stop_file: bool = False
    job: Job | None = None
    was_asked: bool = False
    host: str = ""
    seconds_since_sign: float | None = None
    sign_seconds: float = 0.0

    @property
    def has_sign(self) -> bool:
        """Whether somebody wrote lately."""
        return self.seconds_since_sign is not None and self.seconds_since_sign < self.sign_seconds


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
    job = _job_of(attempt)
    if "left" in last and (facts.was_asked or not _is_followed(facts.events, job)):
        return _of_supervisor(last["left"], last.get("ended"))
    if "restarting" in last and not _is_over(last["restarting"], facts.now):
        return _paused(last["restarting"])
    # Whoever is told to start a run again that is at work elsewhere ends up with two of them.
    if who := _who_may_know(facts, last, job):
        return _unknown(facts, last, who)
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
        elif is_of_started(event):
            failures += event.get("how") not in (STOPPED, FINISHED)
            is_open = False
    return failures


def _at_work(facts: Facts, last: dict[str, dict[str, Any]]) -> Where:
    if "restarting" in last and not facts.is_taken:
        return _paused(last["restarting"])
    # Who could not start, because another one is at work there, does not end it.
    if "ended" in last and (is_of_started(last["ended"]) or not facts.is_taken):
        told = ended_told(last["ended"])
        return Where("running", f"ending: {told}" if told else "ending")
    if facts.has_stop_file:
        return Where("running", "asked to stop by the file stop; it saves after its step, and ends")
    return Where("running" if "training" in last or not facts.events else "starting")


def _job_of(attempt: Sequence[dict[str, Any]]) -> str | None:
    return next((str(event["job"]) for event in attempt if event.get("job")), None)


def _is_followed(events: Sequence[dict[str, Any]], job: str | None) -> bool:
    """Whether other jobs of its chain or array were to come after a job."""
    chains = [event["chain"] for event in events if event["event"] == "submitted" and event.get("chain")]
    return job is not None and any(job.partition("_")[0] in chain and chain[-1] != job for chain in chains)


def _who_may_know(facts: Facts, last: dict[str, dict[str, Any]], job: str | None) -> str | None:
    """Who could say whether somebody is at work and was not heard; None if it is known that nobody is."""
    if job is not None and not facts.was_asked:
        # Without a supervisor, nothing comes after an end.
        return None if "ended" in last and "launched" not in last else "SLURM"
    if "ended" in last or facts.job is not None:
        return None
    nodes = last.get("started", {}).get("nodes") or []
    where_else = nodes[0] if nodes and nodes[0] != facts.host else None  # where rank 0 holds the folder's lock
    if "started" in last and job is None and where_else:
        return where_else
    is_lock_seen = bool(nodes) and not where_else and facts.is_taken is not None
    return (", ".join(nodes) or "its machine") if facts.has_sign and not is_lock_seen else None


def _unknown(facts: Facts, last: dict[str, dict[str, Any]], who: str) -> Where:
    if "left" in last or "ended" in last:
        end = last.get("ended", {})
        why = last.get("left", {}).get("reason") or ended_told(end) or end.get("how")
        told = f"ended: {why}; whether it is started again"
    elif "started" in last or "launched" in last:
        told = "started, and has not ended as far as its folder tells; whether it is at work"
    elif "requeued" in last:
        told = f"requeued: {last['requeued'].get('reason')}; whether it waits or is at work"
    else:
        told = "submitted, and not started as far as its folder tells; whether it waits"
    told += ", SLURM could not be asked" if who == "SLURM" else f", cannot be seen from here, only on {who}"
    if facts.seconds_since_sign is not None:
        told += f"; its metrics or logs changed {as_duration(facts.seconds_since_sign)} ago"
    again = "when SLURM answers" if who == "SLURM" else f"on {who}"
    return Where("unknown", told, f"ask again {again}, before anything is started again")


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
    return Where("queued", "submitted, and not started as far as its folder tells")
