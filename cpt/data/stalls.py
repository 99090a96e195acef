"""Says what a run waits for when its data does not come: a slow or dead disk has no message of its own."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)


@dataclass
class _Wait:
    """A wait in progress: since when, for what."""

    what: Callable[[], str]
    since: float = field(default_factory=time.monotonic)


class StallWatch:
    """Warns from a thread of its own when a wait has lasted `seconds`, and again whenever it has doubled.

    The thread begins with the first wait and ends with `close`, or with this object.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waits: list[_Wait] = []  # at most one
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._closed.set)

    def begin(self, what: Callable[[], str]) -> None:
        """A wait begins; `what` tells what for, asked when it has become long."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_watch, args=(self._waits, self._closed, self._seconds), name="stall watch", daemon=True
            )
            self._thread.start()
        self._waits[:] = [_Wait(what)]

    def end(self) -> None:
        """The wait is over."""
        (wait,) = self._waits
        self._waits.clear()
        waited = time.monotonic() - wait.since
        if waited >= self._seconds:
            _log.warning("data came after %.1f s; going on", waited)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread:
            self._thread.join()


def _watch(waits: list[_Wait], closed: threading.Event, seconds: float) -> None:
    watched: _Wait | None = None
    told_at = seconds
    while not closed.wait(min(1.0, seconds / 4)):
        now = list(waits)
        if now != [watched]:
            watched, told_at = (now[0] if now else None), seconds
        if watched and time.monotonic() - watched.since >= told_at:
            _log.warning("waiting for data for %.1f s: %s", time.monotonic() - watched.since, watched.what())
            told_at *= 2
