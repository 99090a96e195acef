"""What a lineage has consumed: for each source the intervals of its shuffled windows, by epoch.

Because the order of windows is a pure function of (corpus, sequence length, seed, epoch), a hundred billion tokens are
a few numbers here. A child starts with its parent's ledger; replay draws from it; `ledger.json` is it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from cpt.config import Fault

_FORMAT_VERSION = 1
_WITH_SKIPPED = 2  # of a ledger that earlier releases would read as if its windows had all been trained on


@dataclass(frozen=True)
class Entry:
    """Windows consumed of one corpus, cut at one length and shuffled with one seed.

    `epochs`: for each epoch (0, 1, ...) the disjoint intervals [start, stop) of positions in that epoch's order.
    `num_windows`: windows in one epoch. `corpus`: where it lay; `fingerprint` tells whether it is still the same.
    `num_inherited`: how many of the consumed windows an ancestor of the present run consumed, not the run itself.
    `skipped`: as `epochs`, those of the consumed windows that nothing was learned from.
    """

    source: str
    corpus: str
    fingerprint: str
    sequence_length: int
    seed: int
    num_windows: int
    epochs: tuple[tuple[tuple[int, int], ...], ...] = ()
    num_inherited: int = 0
    skipped: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def key(self) -> tuple[str, int, int]:
        """Entries with equal keys speak of the same windows."""
        return self.fingerprint, self.sequence_length, self.seed

    @property
    def num_consumed(self) -> int:
        """Windows consumed in all epochs together."""
        return _number_in(self.epochs)

    @property
    def num_skipped(self) -> int:
        """How many of these nothing was learned from."""
        return _number_in(self.skipped)

    def intervals(self) -> list[tuple[int, int, int]]:
        """All intervals of what was trained on, as (epoch, start, stop), in order."""
        skipped = dict(enumerate(self.skipped))
        return [
            (epoch, start, stop)
            for epoch, intervals in enumerate(self.epochs)
            for start, stop in _without(intervals, skipped.get(epoch, ()))
        ]

    def with_draws(self, first: int, number: int) -> Entry:
        """This entry after draws `first` to `first + number` of its endless order (epoch after epoch) as well."""
        return replace(self, epochs=self._with(self.epochs, first, number))

    def with_skipped(self, first: int, number: int) -> Entry:
        """This entry with so many draws among those that nothing was learned from."""
        return replace(self, skipped=self._with(self.skipped, first, number))

    def _with(
        self, epochs: tuple[tuple[tuple[int, int], ...], ...], first: int, number: int
    ) -> tuple[tuple[tuple[int, int], ...], ...]:
        of_epochs = [list(intervals) for intervals in epochs]
        while number > 0:
            epoch, start = divmod(first, self.num_windows)
            stop = min(self.num_windows, start + number)
            of_epochs.extend([] for _ in range(epoch + 1 - len(of_epochs)))
            of_epochs[epoch].append((start, stop))
            number -= stop - start
            first += stop - start
        return tuple(tuple(_joined(intervals)) for intervals in of_epochs)


@dataclass(frozen=True)
class ShareChange:
    """From `window` of a stage on, counted from where that stage first began, `share` of its windows are replayed.

    It was decided after an evaluation in which `source` had lost `forgetting` nats a token.
    """

    stage: str
    window: int
    share: Fraction
    source: str
    forgetting: float

    def as_json(self) -> dict[str, Any]:
        """For `ledger.json`; the share as a fraction, which is exact, and what is no finite number as text."""
        lost = self.forgetting if math.isfinite(self.forgetting) else str(self.forgetting)
        return {**asdict(self), "share": str(self.share), "forgetting": lost}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> ShareChange:
        """The change that `as_json` described."""
        return ShareChange(**{**plain, "share": Fraction(plain["share"]), "forgetting": float(plain["forgetting"])})


@dataclass(frozen=True)
class Skipped:
    """From `window` of a stage on, counted from where that stage first began, nothing is learned from `number` windows.

    `step`: the one that was bad, and `reason` why. `is_inherited`: an ancestor of the present run found them.
    """

    stage: str
    window: int
    number: int
    step: int
    reason: str
    is_inherited: bool = False

    @property
    def stop(self) -> int:
        """The first window of the stage after them."""
        return self.window + self.number

    def as_json(self) -> dict[str, Any]:
        """For `ledger.json`."""
        return asdict(self)

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Skipped:
        """What `as_json` described."""
        return Skipped(**plain)


@dataclass(frozen=True)
class Stop:
    """`stop_if` ended a run of the lineage after its step `step`, in `stage`.

    In the evaluation there `source` had lost `forgetting` nats a token, of which `above` were allowed.
    """

    stage: str
    step: int
    source: str
    forgetting: float
    above: float

    def as_json(self) -> dict[str, Any]:
        """For `ledger.json`; what is no finite number as text."""
        lost = self.forgetting if math.isfinite(self.forgetting) else str(self.forgetting)
        return {**asdict(self), "forgetting": lost}

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Stop:
        """The stop that `as_json` described."""
        return Stop(**{**plain, "forgetting": float(plain["forgetting"])})


@dataclass(frozen=True)
class Ledger:
    """The entries of a lineage, at most one for each key, in the order in which their sources were first consumed.

    `share_changes`: of replay, while stages were going on, oldest first; the order of such a stage is a function of
    them too. `stops`: by `stop_if`, oldest first; nothing depends on them. `skipped`: windows of stages that nothing is
    learned from, in the order in which they were found.
    """

    entries: tuple[Entry, ...] = ()
    share_changes: tuple[ShareChange, ...] = ()
    stops: tuple[Stop, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def find(self, fingerprint: str, sequence_length: int) -> Entry | None:
        """The entry of that corpus cut at that length, whatever its seed; None if nothing of it was consumed."""
        matching = (e for e in self.entries if (e.fingerprint, e.sequence_length) == (fingerprint, sequence_length))
        return next(matching, None)

    def with_entry(self, entry: Entry) -> Ledger:
        """This ledger with `entry` in place of the one with its key, or added."""
        if any(old.key == entry.key for old in self.entries):
            return replace(self, entries=tuple(entry if old.key == entry.key else old for old in self.entries))
        return replace(self, entries=(*self.entries, entry))

    def with_stop(self, stop: Stop) -> Ledger:
        """This ledger with `stop` added, or as it is: the same command again is stopped at the same place again."""
        # As JSON, where a loss that is no number equals itself.
        is_known = stop.as_json() in [old.as_json() for old in self.stops]
        return self if is_known else replace(self, stops=(*self.stops, stop))

    def as_inherited(self) -> Ledger:
        """The ledger that a child begins with: all that was consumed, was consumed by ancestors."""
        entries = tuple(replace(entry, num_inherited=entry.num_consumed) for entry in self.entries)
        return replace(self, entries=entries, skipped=as_inherited(self.skipped))

    def as_json(self) -> dict[str, Any]:
        """What `ledger.json` holds."""
        has_skipped = self.skipped or any(entry.num_skipped for entry in self.entries)
        return {
            "format_version": _WITH_SKIPPED if has_skipped else _FORMAT_VERSION,
            "sources": [
                {
                    "source": e.source,
                    "corpus": e.corpus,
                    "fingerprint": e.fingerprint,
                    "sequence_length": e.sequence_length,
                    "seed": e.seed,
                    "windows_an_epoch": e.num_windows,
                    "windows_consumed": e.num_consumed,
                    "windows_inherited": e.num_inherited,
                    "epochs": _as_lists(e.epochs),
                    **({"skipped": _as_lists(e.skipped)} if e.num_skipped else {}),
                }
                for e in self.entries
            ],
            **({"share_changes": [change.as_json() for change in self.share_changes]} if self.share_changes else {}),
            **({"stops": [stop.as_json() for stop in self.stops]} if self.stops else {}),
            **({"skipped": [skipped.as_json() for skipped in self.skipped]} if self.skipped else {}),
        }

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Ledger:
        """The ledger that `as_json` described; Fault if another release wrote it."""
        version = plain.get("format_version")
        if version not in (_FORMAT_VERSION, _WITH_SKIPPED):
            raise Fault(
                f"a ledger of format_version {version}: this release reads {_FORMAT_VERSION} and {_WITH_SKIPPED}"
            )
        return Ledger(
            tuple(
                Entry(
                    source=s["source"],
                    corpus=s["corpus"],
                    fingerprint=s["fingerprint"],
                    sequence_length=s["sequence_length"],
                    seed=s["seed"],
                    num_windows=s["windows_an_epoch"],
                    epochs=_as_tuples(s["epochs"]),
                    num_inherited=s.get("windows_inherited", 0),
                    skipped=_as_tuples(s.get("skipped", ())),
                )
                for s in plain["sources"]
            ),
            tuple(map(ShareChange.from_json, plain.get("share_changes", ()))),
            tuple(map(Stop.from_json, plain.get("stops", ()))),
            tuple(map(Skipped.from_json, plain.get("skipped", ()))),
        )


def as_inherited(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    """The same windows, as a child knows them."""
    return tuple(replace(one, is_inherited=True) for one in skipped)


def _joined(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same positions as disjoint intervals in order; neighbours are made one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _without(intervals: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of disjoint intervals in order, if `holes`, likewise, are taken out."""
    left = list(intervals)
    for start, stop in holes:
        left = [
            part
            for one, other in left
            for part in ((one, min(other, start)), (max(one, stop), other))
            if part[0] < part[1]
        ]
    return left


def _number_in(epochs: Iterable[Iterable[tuple[int, int]]]) -> int:
    return sum(stop - start for intervals in epochs for start, stop in intervals)


def _as_lists(epochs: Iterable[Iterable[tuple[int, int]]]) -> list[list[list[int]]]:
    return [[list(interval) for interval in intervals] for intervals in epochs]


def _as_tuples(epochs: Iterable[Iterable[Iterable[int]]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple((start, stop) for start, stop in intervals) for intervals in epochs)
