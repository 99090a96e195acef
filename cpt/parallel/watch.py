"""Whether the run is alive: every rank gives signs, the first one reads them all, and who is gone or hangs is named.

    the loop     alive("loading data", step)          one assignment; it never waits
    signs        a thread that talks to the others, over the store at which they met (signs.py)
    the judge    a thread that never waits: what do the signs mean (verdict.py)? If somebody failed, is gone or hangs:
                 stacks of all threads --> logs/stacks-rank-NNNNN.txt, one message, and the process ends
    C            ends a process in which no thread gets Python's lock, a good while later

A process by itself talks to nobody and judges its own sign.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from cpt.observe import attempts
from cpt.observe.logs import keep_in_file
from cpt.parallel.signs import Signs
from cpt.parallel.verdict import FAILED, STARTING, Limits, Sign, Verdict, judge

_log = logging.getLogger(__name__)

_BEATS, _LEAST_EVIDENCE_SECONDS = 4, 3.0  # without a sign, when something else says that a rank is gone
_STANDARD_ERROR = 2
_ENDING_SECONDS = 60.0  # for a process whose collectives broke
_WRITING_SECONDS = 10.0  # for stacks and messages on disks that may be what hangs


@dataclass(frozen=True)
class Settings:
    """`hang_seconds`: end the run when no rank has got any further for so long; None: never, and nobody is watched.

    `slow_seconds`: for so long instead until the first step is made, where checkpoints are read and what is compiled is
    compiled, and while training waits for a save. `lost_seconds`: a rank is gone of which nothing is heard for so long.
    """

    hang_seconds: float | None = 900.0
    slow_seconds: float = 3600.0
    lost_seconds: float = 60.0

    def faults(self) -> list[str]:
        """No time at all; less time for what is slow."""
        times = {name: value for name, value in vars(self).items() if value is not None}
        faults = [f"{name} = {value:g}: at least 1 second" for name, value in times.items() if value < 1]
        if self.hang_seconds is not None and self.slow_seconds < self.hang_seconds:
            faults.append(
                f"slow_seconds = {self.slow_seconds:g}: at least hang_seconds = {self.hang_seconds:g}; "
                "it is for what may take longer"
            )
        return faults

    @property
    def limits(self) -> Limits:
        """What is judged by. Signs are given thirty times in `lost_seconds`, but not more often than four a second."""
        beat = min(2.0, max(0.25, self.lost_seconds / 30))
        evidence = max(_LEAST_EVIDENCE_SECONDS, _BEATS * beat)
        return Limits(self.hang_seconds, self.slow_seconds, self.lost_seconds, evidence, beat)


class Watch:
    """One rank's part in it. Nothing is watched before `open`; `alive` may be called all the same."""

    def __init__(self, settings: Settings | None = None, rank: int = 0, size: int = 1) -> None:
        self._limits = (settings or Settings(hang_seconds=None)).limits
        self._rank, self._size = rank, size
        self._place = (0, STARTING, 0, time.monotonic())  # exchanged as a whole: other threads read it
        self._sign = Sign(socket.gethostname())  # what does not change with the place
        self._signs: Signs | None = None
        self._judge: threading.Thread | None = None
        self._is_open, self._is_closed = False, threading.Event()
        self._failed_since: float | None = None
        self._folder: Path | None = None
        self._stacks, self._stacks_path = _STANDARD_ERROR, Path()

    # ---- for the loop

    def alive(self, phase: str | None = None, step: int | None = None) -> None:
        """This rank has come to another place; all ranks call it at the same places. What is left out stays."""
        count, old_phase, old_step, _ = self._place
        self._place = (count + 1, phase or old_phase, old_step if step is None else step, time.monotonic())

    def still_alive(self) -> None:
        """This rank has got further within a place, where others do not come to do the same as often."""
        self._place = (*self._place[:3], time.monotonic())

    def keep_in(self, folder: Path) -> None:
        """From now on the run folder is there, with its logs: stacks and what ends the run are written into it."""
        self._folder = folder
        if self._is_open:
            self._let_go_of_stacks()
            self._stacks_path = folder / "logs" / f"stacks-rank-{self._rank:05d}.txt"
            self._stacks = os.open(self._stacks_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            tell_stacks_when_asked(self._stacks)

    @property
    def steps_done(self) -> int:
        """Steps before the one that this rank is at."""
        return max(0, self._place[2] - 1)

    # ---- from the meeting to the parting

    def open(self, store: dist.Store | None = None, ends_with_first: bool = True) -> None:
        """Begin to give signs and to judge. `ends_with_first`: the first rank keeps the store, not a launcher."""
        self._is_open = True
        if self._limits.hang is None:
            return
        if store is not None:
            self._signs = Signs(store, self._rank, self._size, self._limits, self._sign_now, ends_with_first)
        self._judge = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._judge.start()

    def close(self) -> None:
        """Stop watching; the others are told, so that they do not miss this rank."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        self._sign = replace(self._sign, is_closed=True)
        if self._signs:
            self._signs.tell(is_last=True)
        if self._judge:
            self._judge.join(1.0)
        self._let_go_of_stacks()
        if self._judge is None:
            return
        faulthandler.cancel_dump_traceback_later()
        if self._sign.failed or self._sign.broken:
            faulthandler.dump_traceback_later(_ENDING_SECONDS, exit=True)  # libraries may hang in their destructors

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """What is raised inside ends all ranks, with one message; an error that all ranks raise has `is_everybodys`."""
        try:
            yield
        except BaseException as error:
            if self._signs and not getattr(error, "is_everybodys", False):
                if is_of_a_connection(error):
                    self._wait_for_verdict(first_line(error))
                else:
                    self._tell_failure(first_line(error))
            raise

    def _tell_failure(self, reason: str) -> None:
        """This rank ends for this reason; the others learn it before its connections break."""
        self._sign = replace(self._sign, failed=reason)
        self._signs.tell()
        if self._rank == 0:
            self._signs.tell(judge([self._sign_now()], [0.0], self._limits))
            self._signs.linger()

    def _wait_for_verdict(self, reason: str) -> None:
        """A connection broke. Whose end that was is known in a few seconds, and this process ends; else return."""
        if threading.current_thread() is threading.main_thread():
            # A launcher that sees one rank end asks the others to, which must not keep them from saying why.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        self.still_alive()
        self._sign = replace(self._sign, broken=reason)
        self._signs.tell()
        self._judge.join(4 * self._limits.evidence + _WRITING_SECONDS)
        if self._folder:
            attempts.note_end(self._folder, how=attempts.FAILED, step=self.steps_done, reason=reason)

    def fails(self, reason: str) -> None:
        """This process is about to end for this reason, without raising it; the others learn it."""
        if self._signs:
            self._tell_failure(reason)

    # ---- the judge

    def _sign_now(self) -> Sign:
        count, phase, step, since = self._place
        seconds = round(time.monotonic() - since, 2)
        return replace(self._sign, count=count, phase=phase, step=step, seconds=seconds)

    def _watch(self) -> None:
        tick, looked = self._limits.beat / 2, time.monotonic()
        while not self._is_closed.wait(tick):
            slept, looked = time.monotonic() - looked, time.monotonic()
            if slept > self._limits.lost / 2:  # this process was stopped, and perhaps the others were
                self._place = (*self._place[:3], looked)
                if self._signs:
                    self._signs.forgive()
            faulthandler.dump_traceback_later(self._limits.hang + self._limits.lost, exit=True, file=self._stacks)
            if self._signs:
                found = self._signs.verdict(self._sign.broken is not None)
            else:
                found = judge([self._sign_now()], [0.0], self._limits)
            if found and self._is_time_for(found):
                self._end(found)

    def _is_time_for(self, found: Verdict) -> bool:
        """Whether to end now. After a failure most ranks end by themselves in a moment, with its exit status."""
        if found.kind != FAILED or self._sign.broken is not None:
            return True
        self._failed_since = self._failed_since or time.monotonic()
        return self._sign.failed is None and time.monotonic() - self._failed_since > self._limits.evidence

    def _end(self, found: Verdict) -> None:
        """Write down why, and end this process, whatever it is doing."""
        if self._signs and self._rank == 0:
            self._signs.tell(found)
        writing = threading.Thread(target=self._write_down, args=(found,), daemon=True)
        writing.start()
        writing.join(_WRITING_SECONDS)
        self._sign = replace(self._sign, has_heard=True)
        if self._signs:
            self._signs.tell()
            if self._rank == 0:
                self._signs.linger()
        os._exit(1)  # what is hung would hang a destructor too

    def _write_down(self, found: Verdict) -> None:
        """The one message, if no other rank tells it, stacks, and a line in this rank's log."""
        if found.kind != FAILED:  # who failed tells it
            # The first rank tells before it touches a disk, which may be what hangs; what it has found, no other does.
            is_told = self._signs is not None and self._signs.is_announced
            if self._rank == 0 or (self._folder is None and found.rank == 0):
                self._tell(found)
            with suppress(OSError):
                os.write(self._stacks, f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {found.reason}\n".encode())
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            fields = {"how": attempts.FAILED, "reason": found.reason, "rank": found.rank, "node": found.node}
            has_noted = self._folder and attempts.note_end(self._folder, step=self.steps_done, **fields)
            if has_noted and self._rank > 0 and not is_told:
                self._tell(found)
        keep_in_file([found.reason])

    def _tell(self, found: Verdict) -> None:
        where = f"; stacks of all ranks: {self._folder}/logs/stacks-rank-*.txt" if self._folder else ""
        with suppress(OSError):
            os.write(_STANDARD_ERROR, f"cpt train: {found.reason}{where}\n".encode())

    def _let_go_of_stacks(self) -> None:
        file, self._stacks = self._stacks, _STANDARD_ERROR
        if file == _STANDARD_ERROR:
            return
        tell_stacks_when_asked(_STANDARD_ERROR)
        faulthandler.cancel_dump_traceback_later()
        os.close(file)
        with suppress(OSError):
            if self._stacks_path.stat().st_size == 0:
                self._stacks_path.unlink()


def tell_stacks_when_asked(file: int) -> None:
    """From now on `kill -USR2 PID` writes the stacks of all threads into this open file, and ends nothing."""
    faulthandler.register(signal.SIGUSR2, file, all_threads=True)


def is_of_a_connection(error: BaseException) -> bool:
    """Whether a collective failed, as it does on all others when one rank ends."""
    told = str(error)
    # gloo's errors are plain ones, and begin with the file of its sources.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/" in told or "NCCL" in told)
    )


def first_line(error: BaseException) -> str:
    """`ValueError: what was wrong`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
