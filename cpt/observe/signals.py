"""Being asked to stop, by a signal or by a launcher that is gone: note it, finish the step, let the loop save.

A second Ctrl-C stops at once.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`signal`: the number of the first signal that came, None so far if none did.

    `why_orphaned()`: one line if what started this process is gone, which counts as a SIGTERM; else None.
    """

    def __init__(self, why_orphaned: Callable[[], str | None]) -> None:
        self.signal: int | None = None
        self._why_orphaned = why_orphaned
        self._was_interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler. It must only set a flag: the ranks are told one after another, and a save needs all of them."""
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._was_interrupted = self._was_interrupted or number == signal.SIGINT
        self.signal = self.signal or number

    def is_asked(self) -> bool:
        """Whether to stop after the next step."""
        if self.signal is None and (reason := self._why_orphaned()):
            _log.warning("%s: this run saves after its next step and ends, as it would at SIGTERM", reason)
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None


@contextmanager
def listening_for_stop(why_orphaned: Callable[[], str | None] = lambda: None) -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGUSR1 while inside; afterwards they mean what they meant before."""
    request = StopRequest(why_orphaned)
    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
