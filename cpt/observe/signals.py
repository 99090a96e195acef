"""Being asked to stop: note it, finish the step, let the loop save. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`signal`: the number of the first signal that came, None so far if none did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._was_interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler. It must only set a flag: the ranks are told one after another, and a save needs all of them."""
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._was_interrupted = self._was_interrupted or number == signal.SIGINT
        self.signal = self.signal or number


@contextmanager
def listening_for_stop() -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGUSR1 while inside; afterwards they mean what they meant before."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
