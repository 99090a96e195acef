"""One start of a command, with every process that comes of it: it is told to stop, waited for, and cleared away.

    supervisor --> srun                    tasks, on other machines too: SLURM ends them
               --> python                  the only rank
               --> deepspeed, torchrun --> ranks, some in sessions of their own

What a launcher leaves behind when it dies becomes a child of this process, so that nothing of an attempt outlives it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from cpt.config import Fault
from cpt_launcher.launchers import NAMES, program_of

_SET_CHILD_SUBREAPER = 36  # of prctl, linux/prctl.h
_LOOK_SECONDS = 0.2
_DYING_SECONDS = 30.0  # after a SIGKILL; a process that waits for a disk or a device which does not answer cannot die


def signal_for(command: Sequence[str]) -> signal.Signals | None:
    """The signal that tells a command's ranks to save and stop; None if it would end what starts them instead.

    srun takes SIGTERM and SIGINT for itself, and kills its tasks; SIGUSR1 it hands on, which is well if they are ranks.
    The launchers of DeepSpeed and torch end at a signal, or kill their ranks soon after: those, and whatever is not
    known here, are asked by the stop file alone.
    """
    number, words = signal.SIGTERM, command
    if os.path.basename(command[0]) == "srun":
        number = signal.SIGUSR1
        python = next((i for i, word in enumerate(command) if os.path.basename(word).startswith("python")), 0)
        is_task = python and (python == 1 or command[python - 1].startswith("-") or command[python - 1].isdigit())
        words = command[python:] if is_task else []
    program = program_of(words)
    return number if program and program not in NAMES else None


class Attempt:
    """A command that was started, in a session of its own: Ctrl-C in a terminal reaches it only through us."""

    def __init__(self, command: Sequence[str]) -> None:
        _adopt_orphans()
        self._command = command
        self._killed_at: float | None = None
        try:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise Fault(f"{command[0]} cannot be started: {error.strerror}; it is the word after --") from None

    def status(self) -> int | None:
        """Its exit status, 128 + N if signal N ended it; None as long as it runs."""
        status = self._child.poll()
        return 128 - status if status is not None and status < 0 else status

    def tell(self) -> None:
        """Hand the request to stop to its ranks, where a signal does that."""
        number = signal_for(self._command)
        if number is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def is_unkillable(self) -> bool:
        """Whether it was killed half a minute ago and is there still; `clear` tells of it."""
        return self._killed_at is not None and time.monotonic() - self._killed_at > _DYING_SECONDS

    def kill(self) -> None:
        """End all of it at once."""
        self._killed_at = self._killed_at or time.monotonic()
        for process in self.left():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def left(self) -> list[psutil.Process]:
        """Its processes that have not ended, on this machine."""
        return [found for found in psutil.Process().children(recursive=True) if not _has_ended(found)]

    def clear(self, seconds: float) -> list[str]:
        """Wait so long for what the ended command has left, then kill it; the command lines of what was killed.

        Ranks whose launcher is gone see that themselves, and save. What cannot be killed is said to be there still.
        """
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            _bury()
            time.sleep(_LOOK_SECONDS)
        told = {process.pid: _told(process) for process in left}
        deadline = time.monotonic() + _DYING_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            told |= {process.pid: _told(process) for process in left if process.pid not in told}
            self.kill()
            time.sleep(_LOOK_SECONDS)
        _bury()
        for process in left:
            told[process.pid] = f"{_told(process)}, which is there still: a disk or a device does not answer it"
        return list(told.values())


def _adopt_orphans() -> None:
    """Make this process the parent of what its children leave; on Linux only, elsewhere such processes are not seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _bury() -> None:
    """Ask for the exit statuses of adopted processes that have ended; not before the command's own is known."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _told(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline())[:120]})"
    except psutil.Error:
        return str(process.pid)
