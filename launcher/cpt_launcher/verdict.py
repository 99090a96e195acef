"""What an attempt came to, and how often in a row it came to nothing: pure functions of what the run wrote."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cpt.observe.attempts import BY_FILE, STOPPED, last_end

CANNOT_WORK = 2  # the exit status of a request that cannot work; so ends Python, too, when there is no such script

_TAKEN_AWAY = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends to ranks whose nodes it takes


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, and why in one line. `signal`: the number of the one that asked it to stop.

    `is_by_file`: its ranks were asked by the file `stop`.
    """

    end: Literal["finished", "refused", "final", "stopped", "failed"]
    reason: str
    signal: int | None = None
    is_by_file: bool = False


@dataclass(frozen=True)
class Limits:
    """`restarts`: so many failures without a newer checkpoint are followed by another start, after `backoff` seconds at
    first and twice as many after each more. `idle`: so many tries in all, those that were asked to stop included.
    """

    restarts: int = 3
    backoff: float = 10.0
    idle: int = 20
    longest_pause: float = 600.0

    def pause_after(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.backoff * 2 ** min(max(failures - 1, 0), 30), self.longest_pause)


@dataclass(frozen=True)
class Tries:
    """Tries that began at the newest checkpoint and came to no newer one. `failures`: those nobody asked to stop."""

    failures: int
    all: int


def verdict_of(
    status: int, asked: int | None, is_finished: bool, events: Sequence[dict[str, Any]], is_in_job: bool = False
) -> Verdict:
    """What to make of an attempt that ended with `status`, and of which the run told `events`.

    `asked`: the number of the signal that asked the supervisor to stop meanwhile, None if none came. `is_in_job`: in a
    SLURM job, whose tasks SLURM signals when it takes the nodes away.
    """
    if is_finished:
        return Verdict("finished", "the run is finished")
    ended = last_end(events) or {}
    told = ended_told(ended)
    if status == CANNOT_WORK and ended.get("is_final", True):
        return Verdict("refused", told or "the request cannot work; the lines above say why")
    if ended.get("is_final"):
        return Verdict("final", told or "the run says that it would end in the same way again")
    if asked is not None:
        return Verdict("stopped", f"asked to stop by {signal.Signals(asked).name}", asked)
    if ended.get("how") == STOPPED:
        number, is_by_file = ended.get("signal") or int(signal.SIGTERM), ended.get("by") == BY_FILE
        by = "the file stop" if is_by_file else f"signal {number}"
        return Verdict("stopped", told or f"its ranks were asked to stop by {by}", number, is_by_file)
    if told:
        return Verdict("failed", told)
    # Ranks that have started save first, and say so; before, while they prepare, a signal just ends them.
    if is_in_job and status - 128 in _TAKEN_AWAY and not any(event["event"] == "started" for event in events):
        name = signal.Signals(status - 128).name
        return Verdict("stopped", f"its ranks were ended by {name} before they had started", status - 128)
    if status > 128:
        return Verdict("failed", f"ended by signal {status - 128} without a word")
    return Verdict("failed", f"ended with status {status}, without finishing")


def tries_without_progress(events: Sequence[dict[str, Any]], by: str, step: int) -> Tries:
    """Tries of the supervision `by`, the newest included, that began at the checkpoint of `step`, the newest there is.

    A try of which nothing but its start is told, because its machine died, has failed.
    """
    tries: list[tuple[Any, bool]] = []  # the step it began at, whether it was asked to stop
    for event in events:
        if event["event"] == "launched":
            tries.append((event.get("step") if event.get("by") == by else None, False))
        elif tries and (event.get("how") == STOPPED or event.get("asked")):
            tries[-1] = (tries[-1][0], True)
    failures = number = 0
    for began_at, was_asked in reversed(tries):
        if began_at != step:
            break
        number += 1
        failures += not was_asked
    return Tries(failures, number)


def ended_told(ended: dict[str, Any]) -> str:
    """`reason (rank N, node M)` of an `ended`, as far as it says so."""
    reason = " ".join(str(ended.get("reason") or "").split())
    known = " ".join(f"{name} {ended[name]}" for name in ("rank", "node") if ended.get(name) not in (None, ""))
    is_said = all(str(ended.get(name) or "") in reason for name in ("rank", "node"))
    return f"{reason} ({known})" if reason and known and not is_said else reason
