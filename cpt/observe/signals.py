"""Being asked to stop, by a signal, a file or a launcher that is gone: note it, finish the step, let the loop save.

A second Ctrl-C stops at once.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`signal`: the number of the first signal that came, None so far if none did. `is_by_file`: the file came first.

    `why_orphaned()`: one line if what started this process is gone, which counts as a SIGTERM; else None. So does a
    `file`, looked for before each step, if one is named.
    """

    def __init__(self, why_orphaned: Callable[[], str | None], file: Path | None = None) -> None:
        self.signal: int | None = None
        self.is_by_file = False
        self._why_orphaned, self._file = why_orphaned, file
        self._was_interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler. It must only set a flag: the ranks are told one after another, and a save needs all of them."""
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._was_interrupted = self._was_interrupted or number == signal.SIGINT
        self.signal = self.signal or number

    def is_asked(self) -> bool:
        """Whether to stop after the next step."""
        if self.signal is None and (reason := self._why_by_file() or self._why_orphaned()):
            _log.warning("%s: this run saves after its next step and ends, as it would at SIGTERM", reason)
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None

    def _why_by_file(self) -> str | None:
        # os.path answers False where the file system gives an error, which is no reason to stop.
        self.is_by_file = self._file is not None and os.path.exists(self._file)
        return f"{self._file} is there" if self.is_by_file else None


@contextmanager
def listening_for_stop(
    why_orphaned: Callable[[], str | None] = lambda: None, file: Path | None = None
) -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGUSR1 while inside; afterwards they mean what they meant before.

    A `file` that is there already was meant for another attempt, and goes; so does one that was heeded.
    """
    request = StopRequest(why_orphaned, file)
    if file is not None and os.path.exists(file):
        _log.warning("%s was there before this run listened: removed, and not heeded; touch it again to stop", file)
    _remove(file)
    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        if request.signal is not None:
            _remove(file)
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(file: Path | None) -> None:
    if file is not None:
        with suppress(OSError):
            file.unlink(missing_ok=True)
