"""The folders of the runs that one command trains, mostly one, as whoever looks after them sees them; without torch.

A disk that gives errors for a while must not end the supervisor, and with it a run that is well: what could be read
last is the answer until it can be read again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpt.observe.attempts import last_end, read_attempts

# cpt.checkpoint and the ranks know these too; to import those would take torch, and so seconds.
FINISHED_FILE, STOP_FILE = "finished.json", "stop"

_log = logging.getLogger(__name__)


class RunFolders:
    """What stands in the folders of one run, or of those of a version plan; none of them need be there yet."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = list(runs)
        self._last_read: dict[Any, Any] = {}  # by what was read of which run
        self._unreadable: set[Path] = set()
        self._put: dict[Path, int | None] = {}  # the time of the stop file that was put into a run's folder here

    def are_finished(self) -> bool:
        """Whether each says itself that it is done."""
        # os.path answers False where the file system gives an error; pathlib raises it.
        return all(os.path.isfile(run / FINISHED_FILE) for run in self._runs)

    def newest_step(self) -> int:
        """Of the newest checkpoint, counted over all runs: it grows with what is done."""
        return sum(self._read(_read_newest_step, run) or 0 for run in self._runs)

    def num_told(self) -> list[int | None]:
        """How many events each has noted so far; None where that could never be read."""
        told = (self._read(read_attempts, run) for run in self._runs)
        return [None if events is None else len(events) for events in told]

    def events(self, after: Sequence[int | None] = ()) -> list[dict[str, Any]]:
        """What was noted, in the order of time; `after` so many events of each run, none of one where that is None.

        All that a run has where there are fewer: somebody deleted its folder meanwhile, and it began a new file.
        """
        told = [self._read(read_attempts, run) or [] for run in self._runs]
        starts = after or [0] * len(told)
        events = []
        for of_run, start in zip(told, starts, strict=True):
            if start is not None:
                events += of_run[start if start <= len(of_run) else 0 :]
        return sorted(events, key=lambda event: event["time"]) if len(told) > 1 else events

    def end_after(self, after: Sequence[int | None]) -> dict[str, Any] | None:
        """The `ended` that was noted after so many events, and after which nothing was started; None if none was."""
        return last_end(self.events(after))

    def have_stop_file(self) -> bool:
        """Whether somebody else asks by file to stop, also by a `touch` of the one that was put here."""
        found = ((run, _time_of(run / STOP_FILE)) for run in self._runs)
        return any(touched not in (None, self._put.get(run)) for run, touched in found)

    def put_stop_file(self) -> None:
        """Ask by file to stop, unless somebody does. Where the disk refuses, what does not end is killed later."""
        for run in self._runs:
            if _time_of(run / STOP_FILE) is None:
                with suppress(OSError):  # a run of a plan may not have begun either
                    (run / STOP_FILE).touch()
                    self._put[run] = _time_of(run / STOP_FILE)

    def remove_stop_file(self) -> None:
        """Ask no more."""
        for run in self._runs:
            self._put.pop(run, None)
            with suppress(OSError):
                (run / STOP_FILE).unlink(missing_ok=True)

    def _read(self, read: Callable[[Path], Any], run: Path) -> Any:
        """What is read of a run; while its disk gives errors, what was read last, None if nothing was."""
        try:
            self._last_read[read, run] = read(run)
        except OSError as error:
            if run not in self._unreadable:
                _log.warning("%s cannot be read, which ends nothing: %s", error.filename or run, error.strerror)
            self._unreadable.add(run)
        else:
            self._unreadable.discard(run)
        return self._last_read.get((read, run))


def newest_step(run: Path) -> int:
    """The step of the checkpoint that the run would go on from, by its name alone; 0 if there is none."""
    try:
        return _read_newest_step(run)
    except OSError:
        return 0


def _time_of(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _read_newest_step(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest").read_text(encoding="utf-8").strip().removeprefix("step-"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
