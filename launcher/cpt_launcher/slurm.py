"""What we ask of SLURM, and what it says: a job's state, its nodes, its steps; to requeue it, to cancel others.

By its commands, each with a time-out: a controller that does not answer must not hold up a run, nor `cpt status`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from cpt_launcher.rendezvous import FIRST_SPECIAL_STEP

SECONDS = 30.0  # for one command; a busy controller takes some
# States of a node, beside those that say how much of it is taken, on which nothing more should be started.
BAD_STATES = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "REBOOT")


class SlurmError(RuntimeError):
    """A command of SLURM's is missing, failed or did not answer; one line says which, and what it said."""


@dataclass(frozen=True)
class Job:
    """A job as SLURM tells it: `state` (PENDING, RUNNING, ...), why it waits (None if it does not), its nodes."""

    id: str
    state: str
    reason: str | None
    nodes: str | None

    @property
    def is_waiting(self) -> bool:
        """Whether it has still to start, for the first time or again."""
        return self.state in ("PENDING", "REQUEUED", "CONFIGURING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")

    @property
    def is_running(self) -> bool:
        """Whether its processes may be there."""
        return self.state in ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT")


def own_job(environment: Mapping[str, str]) -> str | None:
    """The name of the job whose batch script this process belongs to, as SLURM's commands take it; None in none."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        # The id of an array's last job is that of the array: it would mean all of them.
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def find_job(job: str) -> Job | None:
    """What SLURM knows of a job, of an array the one that is going on; None if it knows none of that number, as it does
    soon after the end.

    Raises SlurmError if it cannot be asked.
    """
    try:
        told = _told("scontrol", "--oneliner", "show", "job", job, seconds=10.0)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    jobs = [job_of_line(job, line) for line in told.splitlines() if line.strip()]
    # An array has a line for each of its jobs: what is going on says more than what is over.
    return min(jobs, key=lambda found: (not found.is_running, not found.is_waiting), default=None)


def job_of_line(job: str, line: str) -> Job:
    """The job that a line of `scontrol --oneliner show job` tells of."""

    def value(name: str) -> str | None:
        found = re.search(rf"(?:^|\s){name}=(\S*)", line)
        return found[1] if found and found[1] not in ("", "None", "(null)", "Unknown") else None

    return Job(job, value("JobState") or "UNKNOWN", value("Reason"), value("NodeList"))


def requeue(job: str) -> None:
    """Put a running job back into the queue, which ends all its processes. Raises SlurmError if SLURM refuses.

    The caller sees to it that it is running: to requeue a job that somebody has cancelled undoes that.
    """
    _told("scontrol", "requeue", job)


def bad_nodes(nodes: str) -> list[str]:
    """`node (STATE)` for each of the nodes, given in SLURM's short form, that SLURM itself would start nothing on."""
    told = _told("scontrol", "--oneliner", "show", "node", nodes)
    found = []
    for line in told.splitlines():
        name, state = (re.search(rf"(?:^|\s){key}=(\S+)", line) for key in ("NodeName", "State"))
        if name and state:
            flags = state[1].rstrip("*").split("+")
            if state[1].endswith("*") or any(flag.startswith(bad) for flag in flags for bad in BAD_STATES):
                found.append(f"{name[1]} ({state[1]})")
    return found


def why_no_step(num_nodes: int) -> str:
    """Start nothing at all on each node of the job we are in; empty if that went well, else what srun said."""
    command = ("srun", "--overlap", "--mem=0", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1")
    try:
        _told(*command, "--cpus-per-task=1", "true", seconds=60.0)
    except SlurmError as error:
        return str(error)
    return ""


def steps_left(job: str) -> list[str]:
    """The steps of a job that are still there, without the batch script and other special ones."""
    told = _told("squeue", "--steps", "--noheader", "--jobs", job, "--format", "%i")
    names = [line.strip() for line in told.splitlines()]
    return [
        name for name in names if (number := name.rpartition(".")[2]).isdigit() and int(number) < FIRST_SPECIAL_STEP
    ]


def kill_step(step: str) -> None:
    """End what is left of a step at once."""
    _told("scancel", "--signal=KILL", step)


def cancel_waiting(jobs: list[str]) -> None:
    """Cancel those of the jobs that have not started."""
    _told("scancel", "--state=PENDING", *jobs)


def submit(script: str) -> str:
    """Submit a script file; the new job's number. Raises SlurmError with what sbatch said."""
    return _told("sbatch", "--parsable", script, seconds=120.0).strip().partition(";")[0]


def _told(*command: str, seconds: float = SECONDS) -> str:
    """What a command of SLURM's wrote."""
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]}: there is no such command here; SLURM's are needed")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {seconds:.0f} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ')}")
    return done.stdout
