"""How ranks learn of one another's signs of life: each puts its own into the store, the first one reads them all.

    every rank    sign/0, sign/1, ...   its own, every beat
    first rank    hub                   how often it has looked, and the verdict once there is one
    the others                          read `hub`

A thread of its own does all the talking, because a store on a machine that is gone never answers. What it has heard,
and when by this rank's clock, others read without waiting.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from cpt.parallel.verdict import Limits, Sign, Verdict, judge, lost_verdict

_log = logging.getLogger(__name__)

_HUB = "hub"


class Signs:
    """This rank's conversation with the others over `store`. `sign_now()`: what it has to say.

    `ends_with_first`: the store does, because the first rank keeps it; else a launcher keeps it.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, limits: Limits, sign_now: Callable[[], Sign],
        ends_with_first: bool,
    ) -> None:  # fmt: skip
        self._store, self._rank, self._size, self._limits = store, rank, size, limits
        self._sign_now, self._ends_with_first = sign_now, ends_with_first
        self._signs = [Sign("another machine")] * size
        self._heard_at = [time.monotonic()] * size  # when a sign was a new one
        self._announced: Verdict | None = None
        self._error: str | None = None  # the store is gone
        self._rounds, self._turn = 0, threading.Condition()
        self._is_asked, self._is_last = threading.Event(), False
        self._thread = threading.Thread(target=self._talk, name="signs of life", daemon=True)
        self._thread.start()

    def verdict(self, has_lost_connection: bool) -> Verdict | None:
        """Why the run ends, if it does, as far as is known here; never waits."""
        if self._announced:
            return self._announced
        now = time.monotonic()
        quiet = [now - heard for heard in self._heard_at]
        if self._error and not self._ends_with_first:
            return None  # the launcher is gone, and that is for the loop to find
        if self._rank == 0:
            self._signs[0], quiet[0] = self._sign_now(), 0.0
            return judge(self._signs, quiet, self._limits)
        has_evidence = has_lost_connection or self._error is not None
        # Where a network is cut in two, the side of the first rank, which knows most, is to tell it first.
        later = self._limits.lost + 2 * self._limits.beat
        limit = min(later, self._limits.evidence) if has_evidence else later
        if quiet[0] > limit and not (self._signs[0].is_closed and self._error is None):
            return lost_verdict(self._signs, [0], quiet[0], self._limits, has_evidence)
        return None

    @property
    def is_announced(self) -> bool:
        """Whether the first rank has said why the run ends."""
        return self._announced is not None

    def forgive(self) -> None:
        """This process did not run for a while: silence is counted anew."""
        self._heard_at = [time.monotonic()] * self._size

    def tell(self, verdict: Verdict | None = None, *, is_last: bool = False) -> None:
        """Return when this rank's sign of now, and its verdict, are in the store, or a beat has gone by."""
        self._announced = self._announced or verdict
        deadline = time.monotonic() + self._limits.beat
        with self._turn:
            wanted = self._rounds + 2  # a round that goes on may have taken the sign before
            while self._rounds < wanted and self._thread.is_alive() and time.monotonic() < deadline:
                self._is_asked.set()
                self._turn.wait(0.05)
        if is_last:
            self._is_last = True
            self._is_asked.set()

    def linger(self) -> None:
        """Return when all that are there have heard the verdict: the store ends with this process."""
        deadline = time.monotonic() + 2 * self._limits.evidence
        while time.monotonic() < deadline and self._thread.is_alive():
            now = time.monotonic()
            if all(
                sign.has_heard or sign.is_closed or sign.failed is not None or now - heard > self._limits.evidence
                for sign, heard in list(zip(self._signs, self._heard_at, strict=True))[1:]
            ):
                return
            self.tell()
            time.sleep(0.02)

    # ---- the thread

    def _talk(self) -> None:
        try:
            while not self._is_last:
                self._is_asked.clear()
                self._one_round()
                with self._turn:
                    self._rounds += 1
                    self._turn.notify_all()
                self._is_asked.wait(self._limits.beat)
        except (dist.DistError, RuntimeError) as error:  # the connection broke, or nobody answers any more
            self._error = str(error).splitlines()[0]
            _log.debug("no more signs of life: %s", self._error)
            if not self._ends_with_first:
                _log.warning("where the ranks met is gone: a rank that is lost or hangs is not noticed any more")

    def _one_round(self) -> None:
        sign = replace(self._sign_now(), beat=self._rounds + 1)
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
        if self._rank == 0:
            heard = self._store.multi_get([f"sign/{rank}" for rank in range(self._size)])
            for rank, raw in enumerate(heard):
                if said := _read(raw, lambda plain: Sign(**plain)):
                    self._hear(rank, said)
            verdict = asdict(self._announced) if self._announced else None
            self._store.set(_HUB, json.dumps({"sign": asdict(sign), "verdict": verdict}))
        elif hub := _read(self._store.get(_HUB), _sign_and_verdict):
            self._hear(0, hub[0])
            self._announced = hub[1] or self._announced

    def _hear(self, rank: int, sign: Sign) -> None:
        if sign.beat != self._signs[rank].beat:
            self._signs[rank], self._heard_at[rank] = sign, time.monotonic()


def _sign_and_verdict(plain: dict[str, Any]) -> tuple[Sign, Verdict | None]:
    return Sign(**plain["sign"]), Verdict(**plain["verdict"]) if plain["verdict"] else None


def _read(raw: bytes, make: Callable[[Any], Any]) -> Any | None:
    """What `make` makes of it; None if that is no sign of ours, which then is silence."""
    try:
        return make(json.loads(raw))
    except (ValueError, TypeError, KeyError) as error:
        _log.debug("a sign of life that cannot be read: %s", error)
        return None
