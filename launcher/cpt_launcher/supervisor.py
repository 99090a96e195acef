"""Keeps a run going: starts its command until the run itself says that it is finished, or there is no point in it.

    finished.json is there                       0
    the request cannot work (status 2)           2
    the run says that its end is final           1
    a signal asked to stop                       saved; requeued in a SLURM job that goes on, else 128 + signal
    a person did, by the file stop or Ctrl-C     saved; 128 + signal, and no other job of its chain goes on
    a failure, and a node of the job is bad      requeued
    a failure                                    again after a while; 1 after so many in a row without a new checkpoint

It goes by what the run wrote (finished.json, attempts.jsonl, checkpoints/latest): launchers lose exit statuses. What it
decides stands there too, so that the next try of a requeued job knows how many came before.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cpt.observe.attempts import FINISHED, note_attempt
from cpt_launcher.attempt import Attempt
from cpt_launcher.environment import keep_environment
from cpt_launcher.own_job import OwnJob
from cpt_launcher.run_folders import STOP_FILE, RunFolders
from cpt_launcher.verdict import CANNOT_WORK, Limits, Tries, Verdict, tries_without_progress, verdict_of

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_END_SECONDS = 30.0  # from the run's last word to the end of its processes, and of what started them
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Supervisor:
    """One supervision of one run, or of those of a version plan, which one command trains: the first keeps the notes.

    `environment` tells whether it goes on in a SLURM job, which then may be requeued.
    """

    def __init__(
        self,
        runs: Sequence[Path],
        command: Sequence[str],
        limits: Limits,
        grace: float,
        environment: Mapping[str, str],
        may_requeue: bool = True,
    ) -> None:
        self._runs, self._run = RunFolders(runs), runs[0]
        self._command, self._limits, self._grace = list(command), limits, grace
        self._environment = environment
        self._job = OwnJob(environment)
        self._may_requeue = may_requeue and self._job.name is not None
        # Tries are counted over the requeues of a job; who starts a supervisor again by hand begins to count anew.
        self._by = f"job {self._job.name}" if self._job.name else f"process {os.getpid()} at {time.time():.0f}"
        self._next_look = 0.0
        self._not_noted: list[dict[str, Any]] = []  # on a full disk tries must be counted, too
        self._asked: int | None = None  # the number of the signal that asked to stop
        self._is_asked_by_file = False
        self._end_seen: tuple[dict[str, Any] | None, float] | None = None  # the run's last word, and when that was read

    def supervise(self) -> int:
        """Start the command as often as it makes sense; the exit status for the caller."""
        self._run.mkdir(parents=True, exist_ok=True)
        with self._listening():
            self._keep_environment()
            if self._runs.have_stop_file():
                _log.warning("%s was there before this start: removed, and not heeded", self._run / STOP_FILE)
            self._runs.remove_stop_file()
            while not self._runs.are_finished():
                verdict = Verdict("stopped", "asked to stop before the start", self._asked)
                if not self._is_asked():
                    verdict = self._try_once()
                if verdict.end == "finished":
                    break
                status = self._after(verdict)
                if status is not None:
                    return status
        _log.info("%s is finished", self._run)
        self._cancel_chain()
        return 0

    # ---- an attempt

    def _try_once(self) -> Verdict:
        """Start the command and wait for its end; what it came to."""
        self._note("launched", step=self._runs.newest_step(), by=self._by, job=self._job.name)
        told_before, steps_before = self._runs.num_told(), self._job.steps()
        attempt = Attempt(self._command)
        asked_at, was_killed, self._end_seen = None, False, None
        while (status := attempt.status()) is None and not attempt.is_unkillable():
            if self._is_asked():
                asked_at = asked_at or self._ask_to_stop(attempt)
                self._runs.put_stop_file()  # again and again: ranks that are just starting take it for an old one
            if not was_killed and (why := self._why_too_late(asked_at, told_before)):
                _log.error("%s: killed", why)
                was_killed = True
                self._job.kill_steps(self._job.steps() - steps_before)
                attempt.kill()
            time.sleep(_LOOK_SECONDS)
        has_left_some = bool(attempt.left())
        deadline = (asked_at or time.monotonic()) + self._grace
        if was_killed or self._runs.end_after(told_before):
            deadline = min(deadline, time.monotonic() + (0.0 if was_killed else _END_SECONDS))
        status = 128 + signal.SIGKILL if status is None else status
        is_ours = self._clear(attempt, steps_before, deadline)
        self._is_asked()  # by a file that came meanwhile
        self._runs.remove_stop_file()
        told = self._runs.events(told_before)
        verdict = verdict_of(status, self._asked, self._runs.are_finished(), told, self._job.name is not None)
        if verdict.end == "stopped" and self._asked is None and (has_left_some or (is_ours and verdict.is_by_file)):
            # Ranks that miss their launcher save and say that they were stopped, but nobody wanted that.
            return Verdict("failed", f"what started its ranks ended with status {status} before them")
        if verdict.end == "failed" and status == 0 and not told:
            where = f"nothing was noted in {self._run}: is that the `output` of its settings, as --run should be?"
            return Verdict("failed", f"{verdict.reason}; {where}")
        return verdict

    def _is_asked(self) -> bool:
        """Whether to stop: by a signal, or by the file `stop`, which then is a person's."""
        if self._runs.have_stop_file():
            self._asked, self._is_asked_by_file = self._asked or int(signal.SIGTERM), True
        return self._asked is not None

    def _ask_to_stop(self, attempt: Attempt) -> float:
        """Hand the request on; when that was."""
        by = f"the file {STOP_FILE}" if self._is_asked_by_file else signal.Signals(self._asked).name
        _log.warning("asked to stop by %s: told the run, which has %.0f s to save", by, self._grace)
        self._runs.put_stop_file()
        attempt.tell()
        return time.monotonic()

    def _why_too_late(self, asked_at: float | None, told_before: Sequence[int]) -> str | None:
        """Why the command is not to be waited for any longer; None if it is."""
        if asked_at is not None and time.monotonic() - asked_at > self._grace:
            return f"not ended {self._grace:.0f} s after the request to stop"
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _END_SECONDS / 10
        ended = self._runs.end_after(told_before)
        if self._end_seen is None or self._end_seen[0] != ended:
            self._end_seen = (ended, time.monotonic())  # not its own time: that is of another machine's clock
        if ended is None or time.monotonic() - self._end_seen[1] < _END_SECONDS:
            return None
        # The first of several runs has ended, and the command goes on with the next one.
        if ended.get("how") == FINISHED and not self._runs.are_finished():
            return None
        # srun waits for the tasks of a node that is gone, and for ever where its own daemon there was killed.
        return f"the run has ended {_END_SECONDS:.0f} s ago, and its command has not"

    def _clear(self, attempt: Attempt, steps_before: set[str], deadline: float) -> bool:
        """See to it that nothing of an ended attempt goes on: what a dead launcher left saves before the deadline.

        Whether it was asked to by the file `stop`.
        """
        for killed in attempt.clear(deadline - time.monotonic()):
            _log.warning("left behind by the command, and killed: %s", killed)
        if not self._job.steps() - steps_before:
            return False
        self._is_asked()
        self._runs.put_stop_file()
        self._job.wait_for_steps(steps_before, deadline)
        return True

    # ---- what to do about its end

    def _after(self, verdict: Verdict) -> int | None:
        """Decide, tell and do; the exit status, None to start again."""
        if verdict.end in ("refused", "final"):
            return self._leave(CANNOT_WORK if verdict.end == "refused" else 1, verdict.reason)
        events = sorted([*self._runs.events(), *self._not_noted], key=lambda event: event["time"])
        tries = tries_without_progress(events, self._by, self._runs.newest_step())
        if verdict.end == "stopped":
            return self._after_stop(verdict, tries)
        if tries.failures > self._limits.restarts or tries.all > self._limits.idle:
            told = f"{tries.failures} failure(s) without a newer checkpoint, the last one: {verdict.reason}"
            return self._leave(1, told, failures=tries.failures)
        bad = self._may_requeue and self._job.bad_nodes()
        if bad and self._requeue(f"{bad}; {verdict.reason}", failures=tries.failures):
            return 1
        pause = self._limits.pause_after(tries.failures)
        _log.warning(
            "failed: %s; started again in %.0f s (failure %d without a newer checkpoint, of %d that are borne)",
            verdict.reason, pause, tries.failures, self._limits.restarts,
        )  # fmt: skip
        self._note("restarting", after_seconds=pause, failures=tries.failures, reason=verdict.reason)
        deadline = time.monotonic() + pause
        while not self._is_asked() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return None

    def _after_stop(self, verdict: Verdict, tries: Tries) -> int:
        """Requeue the job if SLURM ends it before the run is done, as it does at the time limit; the exit status."""
        number = verdict.signal or int(signal.SIGTERM)
        reason = f"asked to stop by the file {STOP_FILE}" if self._is_asked_by_file else verdict.reason
        # Its ranks may have heeded and removed the file before it was seen here.
        is_a_persons = self._is_asked_by_file or verdict.is_by_file or number == signal.SIGINT
        if self._may_requeue and not is_a_persons:
            if tries.all > self._limits.idle:
                reason = f"{reason}; not requeued: {tries.all} tries came to no newer checkpoint"
            elif self._requeue(reason, asked=number):
                return 128 + number
        if is_a_persons:
            self._cancel_chain()
        return self._leave(128 + number, reason, asked=number)

    def _requeue(self, reason: str, **fields: Any) -> bool:
        """Put the job back into the queue; whether it is there."""
        why_not = self._job.why_not_requeued()
        if why_not is None:
            _log.warning("to be requeued: %s", reason)
            self._note("requeued", reason=reason, job=self._job.name, **fields)  # first: to be requeued is to be killed
            why_not = self._job.why_requeue_failed()
        if why_not is not None:
            _log.warning("not requeued: %s", why_not)
            self._note("not_requeued", reason=why_not)
        return why_not is None

    def _leave(self, status: int, reason: str, **fields: Any) -> int:
        _log.log(logging.WARNING if status > 128 else logging.ERROR, "ends here, with status %d: %s", status, reason)
        self._note("left", status=status, reason=reason, job=self._job.name, **fields)
        if status < 128:
            self._cancel_chain()
        return status

    def _cancel_chain(self) -> None:
        submitted = [event for event in self._runs.events() if event["event"] == "submitted"]
        self._job.cancel_chain([event.get("chain") or [] for event in submitted])

    # ---- what it knows

    def _note(self, event: str, **fields: Any) -> None:
        if not note_attempt(self._run, event, **fields):
            self._not_noted.append({"event": event, "time": time.time(), **fields})

    def _keep_environment(self) -> None:
        name = f"environment-{self._job.name or 'here'}.txt"
        try:
            keep_environment(self._environment, self._run / "logs" / name)
        except OSError as error:
            _log.warning("%s: %s", error.filename or name, error.strerror)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note the first signal that asks to stop; more change nothing. What nohup has switched off stays so."""

        def note(number: int, frame: FrameType | None) -> None:
            self._asked = self._asked or number

        caught = [one for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
        before = {one: signal.signal(one, note) for one in caught}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
