"""What replay draws from, and in which order: intervals of the ledger, never a copy.

    ledger entries --rows--> (source, epoch, first position) of every interval --reservoir, if capacity is set-->
        Pool: draw n --shuffle of its round, or original order--> (source, epoch, position)

A pool costs a few numbers a row, however many windows it stands for; only a reservoir holds a number a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from cpt.data.mixture import Mixture
from cpt.data.permutation import Permutation
from cpt.data.ramp import Ramp
from cpt.lineage.ledger import Entry
from cpt.parallel.seeds import derive_seed

# How finely `order: original` divides its draws over the sources.
_FINEST_DIVISION = 4096
_WINDOWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Declared:
    """A corpus that the model saw before this project had it: an open model's data, or a proxy of it.

    `tokens`: it saw the first so many, in the order of the files; None for all.
    """

    corpus: Path
    tokens: int | None = None

    def faults(self) -> list[str]:
        """Nothing seen."""
        if self.tokens is None or self.tokens >= 1:
            return []
        return [f"tokens = {self.tokens}: at least 1; leave it out if the model saw all of the corpus"]


@dataclass(frozen=True)
class Replay:
    """Windows that were consumed before, as `share` of all windows of the stage.

    `accounting`: `adds_to_new` spends the stage's tokens on new windows and replays on top of them;
    `replaces_new` takes the replayed tokens out of the stage's tokens.
    `from`: names of the sources to replay, as the runs that consumed them called them, or `ancestors`: everything that
    the lineage consumed, and everything that is `declared`.
    `scope`: `past_only` draws from what was consumed before the stage, each window once before any again; `all_seen`
    also from what the stage has consumed itself, and shuffles anew whenever that has made the pool an eighth larger.
    `order`: `original` replays each source in the order in which it was consumed, sources in proportion.
    `capacity`: replays from a reservoir of so many windows, uniform over everything seen: a window that is not in it,
    or that a later one pushed out of it, does not come back.
    """

    share: Fraction = Fraction(0)
    accounting: Literal["replaces_new", "adds_to_new"] = "replaces_new"
    from_: Literal["ancestors"] | tuple[str, ...] = "ancestors"
    declared: dict[str, Declared] = field(default_factory=dict)
    scope: Literal["past_only", "all_seen"] = "past_only"
    order: Literal["shuffled", "original"] = "shuffled"
    capacity: Literal["unlimited"] | int = "unlimited"
    ramp: Ramp | None = None

    def faults(self) -> list[str]:
        """A share that leaves nothing new, a reservoir of nothing, an order that a growing pool has not."""
        faults = [] if 0 <= self.share < 1 else [f"share = {float(self.share)}: at least 0 and below 1"]
        if isinstance(self.capacity, int) and self.capacity < 1:
            faults.append(f"capacity = {self.capacity}: at least 1 window, or unlimited")
        if self.order == "original" and self.scope == "all_seen":
            faults.append(
                "order = original: goes with scope: past_only; what is being consumed has no order of its own"
            )
        if self.from_ == ():
            faults.append("from names no source; name some, or write ancestors")
        return faults

    @property
    def is_used(self) -> bool:
        """Whether any slot of the stage is replayed."""
        return self.share > 0 or (self.ramp is not None and self.ramp.start > 0)

    def takes(self, name: str) -> bool:
        """Whether windows of the source of this name are replayed."""
        return self.from_ == "ancestors" or name in self.from_

    def total_tokens(self, tokens: int) -> int:
        """Tokens of a stage whose setting is `tokens`, replayed ones included."""
        if self.accounting == "replaces_new":
            return tokens
        if self.ramp is None:
            return _ceil(tokens / (1 - self.share))
        on_the_ramp = self.ramp.tokens * (1 - (self.ramp.start + self.share) / 2)  # new ones
        return self.ramp.tokens + _ceil(max(Fraction(0), tokens - on_the_ramp) / (1 - self.share))


class Pool:
    """The windows that `entries` hold as trained on, or a reservoir of them, to draw from again and again.

    `entries`: number of the source and its entry. `seed`: of the shuffles. Draws 0 .. len - 1 give every window once,
    the next len draws every window once more, in another order if it is `shuffled`.
    """

    def __init__(self, entries: Sequence[tuple[int, Entry]], replay: Replay, seed: int) -> None:
        rows = [(number, *interval) for number, entry in entries for interval in entry.intervals()]
        self._rows = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)  # source, epoch, first position
        self._row_starts = np.cumsum([0, *(stop - start for _, _, start, stop in rows)])
        self._seed = seed
        self._kept: np.ndarray | None = None  # the reservoir: places among all windows, ascending
        self._size = int(self._row_starts[-1])
        if replay.capacity != "unlimited" and replay.capacity < self._size:
            self._kept = reservoir([entry for _, entry in entries], replay.capacity)
            self._size = len(self._kept)
        self._in_turn = self._turns() if replay.order == "original" and self._size else None
        self._rounds: dict[int, Permutation] = {}

    def __len__(self) -> int:
        return self._size

    def __call__(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, epoch and position, each [n] int64, of these draws [n]."""
        place = self._shuffled(draws) if self._in_turn is None else self._in_order(draws)
        if self._kept is not None:
            place = self._kept[place]
        row = np.searchsorted(self._row_starts, place, side="right") - 1
        return self._rows[row, 0], self._rows[row, 1], self._rows[row, 2] + place - self._row_starts[row]

    def _shuffled(self, draws: np.ndarray) -> np.ndarray:
        rounds, within = np.divmod(draws, self._size)
        place = np.empty_like(draws)
        for number in np.unique(rounds).tolist():
            if number not in self._rounds:
                self._rounds[number] = Permutation(self._size, derive_seed(self._seed, "replay", number))
            at = rounds == number
            place[at] = self._rounds[number](within[at])
        return place

    def _turns(self) -> tuple[Mixture, np.ndarray, np.ndarray]:
        """Which source draws when, and the first place and the number of windows of each source."""
        is_first = np.flatnonzero(np.diff(self._rows[:, 0], prepend=-1))  # first row of each source
        begins = self._row_starts[is_first]
        if self._kept is not None:
            begins = np.searchsorted(self._kept, begins)
        sizes = np.diff(begins, append=self._size)
        scale = min(1.0, _FINEST_DIVISION / self._size)
        quotas = [Fraction(max(1, round(size * scale)) if size else 0) for size in sizes.tolist()]
        return Mixture(quotas), begins, sizes

    def _in_order(self, draws: np.ndarray) -> np.ndarray:
        turns, begins, sizes = self._in_turn
        source = turns.sources(draws)
        return begins[source] + turns.draws(draws) % sizes[source]


def reservoir(entries: Sequence[Entry], capacity: int) -> np.ndarray:
    """A reservoir over everything that the entries hold: ascending places [capacity] among their windows, in order.

    Every window has a random priority of its own, a function of its entry, epoch and position; the `capacity` lowest
    are kept. So each is kept with equal chance, and when more has been seen, what had been pushed out stays out: the
    contents at any time are those of a reservoir that was filled window by window.
    Takes about 15 ns a window seen and memory for `capacity` windows; sources of priorities: bottom-k sampling, Cohen
    and Kaplan 2007.
    """
    priorities, places = np.empty(0, np.uint64), np.empty(0, np.int64)
    for first_place, chunk in _priorities(entries):
        low = chunk < priorities.max() if len(priorities) == capacity else np.ones(len(chunk), bool)
        priorities = np.concatenate([priorities, chunk[low]])
        places = np.concatenate([places, first_place + np.flatnonzero(low)])
        if len(places) > capacity:
            lowest = np.argpartition(priorities, capacity - 1)[:capacity]
            priorities, places = priorities[lowest], places[lowest]
    return np.sort(places)


def _priorities(entries: Sequence[Entry]) -> Iterator[tuple[int, np.ndarray]]:
    """Priorities of all windows, some at a time, each time with the place of the first of them."""
    place = 0
    for entry in entries:
        for epoch, start, stop in entry.intervals():
            key = np.uint64(derive_seed(entry.fingerprint, entry.seed, "reservoir", epoch))
            for first in range(start, stop, _WINDOWS_AT_ONCE):
                last = min(stop, first + _WINDOWS_AT_ONCE)
                yield place, _mix(np.arange(first, last, dtype=np.uint64) + key)
                place += last - first


def _mix(numbers: np.ndarray) -> np.ndarray:
    """64 well-stirred bits of each number (finaliser of splitmix64, public domain)."""
    numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _ceil(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)
