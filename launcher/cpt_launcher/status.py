"""What `cpt status` tells of a run, gathered from its folder, from the lock on it, and from SLURM."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cpt.checkpoint.run_folder import LOCK
from cpt.config import Fault, read_mapping
from cpt.observe.attempts import read_attempts
from cpt.run import Run, run_of
from cpt_launcher import slurm
from cpt_launcher.run_folders import FINISHED_FILE, STOP_FILE, newest_step
from cpt_launcher.state_of_run import Facts, newest_attempt, num_failures, where

_RECENT_STEPS = 20  # of which the speed is told
_TAIL_BYTES = 1 << 18
_LINES_OF_A_LOG = 5
_SIGN_SECONDS = 900.0  # for which a file that changed is a sign of life where the run itself sets no limit


@dataclass(frozen=True)
class Status:
    """What there is to tell of a run; None where it is not known.

    `state`, `reason`, `advice`: see cpt_launcher/state_of_run.py. `step`, `tokens`, `loss`: of the last record of a
    step, `seconds_since_step` ago. `tokens_per_second`, `seconds_left`: of the last steps, while it runs. `checkpoint`:
    the newest one's step, `seconds_since_checkpoint` ago. `starts`, `failures`: attempts so far, and those of them that
    nobody asked to end. `ranks`, `nodes`, `job`: of the newest attempt; `job_state`: what SLURM says of it.
    `last_words`: the newest lines of the logs of a run that failed or died. `notes`: what could not be found out.
    """

    run: Path
    state: str
    reason: str | None
    advice: str | None
    step: int | None
    tokens: int | None
    total_tokens: int | None
    loss: float | None
    seconds_since_step: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: int | None
    seconds_since_checkpoint: float | None
    starts: int
    failures: int
    ranks: int | None
    nodes: Sequence[str]
    job: str | None
    job_state: str | None
    last_words: Sequence[str]
    notes: Sequence[str]


def status_of(run: Path) -> Status:
    """Find out where a run is. Raises Fault if there is none."""
    if not any((run / name).is_file() for name in ("run.yaml", "attempts.jsonl")):
        raise Fault(f"{run}: there is no run (no run.yaml and no attempts.jsonl in it); name a run's folder")
    events, now, notes = read_attempts(run), time.time(), []
    attempt = newest_attempt(events)
    # The run itself knows the job of an array by another number than the array's.
    told = sorted((event for event in attempt if event.get("job")), key=lambda event: event["event"] == "started")
    number = str(told[0]["job"]) if told else None
    job, was_asked = None, False
    for one in [number, *_next_in_chain(events, number)] if number else []:
        try:
            found, was_asked = slurm.find_job(one), True
        except slurm.SlurmError as error:
            notes.append(f"SLURM cannot be asked about job {one}: {error}")
            was_asked = False
            break
        if job is None or (found is not None and (found.is_running or found.is_waiting)):
            job = found
        if job is not None and (job.is_running or job.is_waiting):
            number = one
            break
    settings = _settings(run, notes)
    found = where(
        Facts(
            events,
            now,
            (run / FINISHED_FILE).is_file(),
            _is_taken(run),
            (run / STOP_FILE).exists(),
            job,
            was_asked,
            socket.gethostname(),
            _seconds_since_sign(run, now),
            (settings.watch.hang_seconds if settings else None) or _SIGN_SECONDS,
        )
    )
    started = next((event for event in reversed(events) if event["event"] == "started"), {})
    records = _last_records(run / "metrics.jsonl")
    last, total = records[-1] if records else {}, settings.total_tokens if settings else None
    speed = _speed(records) if found.state == "running" else None
    is_known = bool(speed) and total is not None and "tokens" in last
    return Status(
        run=run,
        state=found.state,
        reason=found.reason,
        advice=found.advice,
        step=last.get("step"),
        tokens=last.get("tokens"),
        total_tokens=total,
        loss=last.get("loss"),
        seconds_since_step=_seconds_since(run / "metrics.jsonl", now) if records else None,
        tokens_per_second=speed,
        seconds_left=(total - last["tokens"]) / speed if is_known else None,
        checkpoint=newest_step(run) or None,
        seconds_since_checkpoint=_seconds_since(run / "checkpoints" / "latest", now),
        starts=sum(event["event"] == "started" for event in events),
        failures=num_failures(events),
        ranks=started.get("ranks"),
        nodes=tuple(started.get("nodes") or ()),
        job=number,
        job_state=job.state if job else None,
        last_words=_last_words(run) if found.state in ("failed", "died") else (),
        notes=tuple(notes),
    )


def _next_in_chain(events: Sequence[dict[str, Any]], job: str) -> list[str]:
    """The jobs that were submitted to go on when that one is over; of an array's job, the array."""
    chains = [event["chain"] for event in events if event["event"] == "submitted" and event.get("chain")]
    array = job.partition("_")[0]
    chain = next((chain for chain in reversed(chains) if array in chain), [])
    return [array] if array != job else chain[chain.index(job) + 1 :] if chain else []


def _is_taken(run: Path) -> bool | None:
    """Whether a process trains in the folder: of this machine, or of any where the file system's locks reach so far;
    None if it has none.
    """
    try:
        file = os.open(run / LOCK, os.O_RDONLY)
    except FileNotFoundError:  # no run was begun here
        return False
    except OSError:
        return None
    try:
        # Shared, and given back at once: a run that begins at this moment is hardly ever kept out by it.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(file)
    return False


def _last_records(path: Path) -> list[dict[str, Any]]:
    """The newest records of steps, of a file that may have millions."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    records = []
    for line in lines[-_RECENT_STEPS - 1 :]:
        try:
            record = json.loads(line)
        except ValueError:  # torn at its end, or where reading began
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _speed(records: Sequence[dict[str, Any]]) -> float | None:
    """Tokens a second of the newest steps, in the middle of them: some waited for a save."""
    speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
    return median(speeds) if speeds else None


def _settings(run: Path, notes: list[str]) -> Run | None:
    path = run / "run.yaml"
    if not path.is_file():
        return None
    try:
        return run_of(read_mapping([str(path)]))
    except Fault as fault:  # of another release, or its parent is gone
        notes.append(f"how long the run is cannot be told: {fault.lines[0]}")
        return None


def _seconds_since_sign(run: Path, now: float) -> float | None:
    """Since the run last wrote metrics or the log of a rank."""
    ages = [_seconds_since(path, now) for path in (run / "metrics.jsonl", *(run / "logs").glob("rank-*.log"))]
    return min((age for age in ages if age is not None), default=None)


def _seconds_since(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _last_words(run: Path) -> tuple[str, ...]:
    """The newest lines of the newest logs, each after its file's name."""
    logs = sorted((run / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    told = []
    for path in logs[-3:]:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        told += [f"{path.name}: {line}" for line in lines[-_LINES_OF_A_LOG:] if line.strip()]
    return tuple(told)
