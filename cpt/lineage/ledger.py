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


@dataclass(frozen=True)
class Entry:
    """Windows consumed of one corpus, cut at one length and shuffled with one seed.

    `epochs`: for each epoch (0, 1, ...) the disjoint intervals [start, stop) of positions in that epoch's order.
    `num_windows`: windows in one epoch. `corpus`: where it lay; `fingerprint` tells whether it is still the same.
    `num_inherited`: how many of the consumed windows an ancestor of the present run consumed, not the run itself.
    """

    source: str
    corpus: str
    fingerprint: str
    sequence_length: int
    seed: int
    num_windows: int
    epochs: tuple[tuple[tuple[int, int], ...], ...] = ()
    num_inherited: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """Entries with equal keys speak of the same windows."""
        return self.fingerprint, self.sequence_length, self.seed

    @property
    def num_consumed(self) -> int:
        """Windows consumed in all epochs together."""
        return sum(stop - start for intervals in self.epochs for start, stop in intervals)

    def intervals(self) -> list[tuple[int, int, int]]:
        """All intervals as (epoch, start, stop), in order."""
        return [(e, start, stop) for e, intervals in enumerate(self.epochs) for start, stop in intervals]

    def with_draws(self, first: int, number: int) -> Entry:
        """This entry after draws `first` to `first + number` of its endless order (epoch after epoch) as well."""
        epochs = [list(intervals) for intervals in self.epochs]
        while number > 0:
            epoch, start = divmod(first, self.num_windows)
            stop = min(self.num_windows, start + number)
            epochs.extend([] for _ in range(epoch + 1 - len(epochs)))
            epochs[epoch].append((start, stop))
            number -= stop - start
            first += stop - start
        return replace(self, epochs=tuple(tuple(_joined(intervals)) for intervals in epochs))


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
    them too. `stops`: by `stop_if`, oldest first; nothing depends on them.
    """

    entries: tuple[Entry, ...] = ()
    share_changes: tuple[ShareChange, ...] = ()
    stops: tuple[Stop, ...] = ()

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
        return replace(self, entries=entries)

    def as_json(self) -> dict[str, Any]:
        """What `ledger.json` holds."""
        return {
            "format_version": _FORMAT_VERSION,
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
                    "epochs": [[list(interval) for interval in intervals] for intervals in e.epochs],
                }
                for e in self.entries
            ],
            **({"share_changes": [change.as_json() for change in self.share_changes]} if self.share_changes else {}),
            **({"stops": [stop.as_json() for stop in self.stops]} if self.stops else {}),
        }

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Ledger:
        """The ledger that `as_json` described; Fault if another release wrote it."""
        version = plain.get("format_version")
        if version != _FORMAT_VERSION:
            raise Fault(f"a ledger of format_version {version}: this release reads {_FORMAT_VERSION}")
        return Ledger(
            tuple(
                Entry(
                    source=s["source"],
                    corpus=s["corpus"],
                    fingerprint=s["fingerprint"],
                    sequence_length=s["sequence_length"],
                    seed=s["seed"],
                    num_windows=s["windows_an_epoch"],
                    epochs=tuple(tuple((a, b) for a, b in intervals) for intervals in s["epochs"]),
                    num_inherited=s.get("windows_inherited", 0),
                )
                for s in plain["sources"]
            ),
            tuple(map(ShareChange.from_json, plain.get("share_changes", ()))),
            tuple(map(Stop.from_json, plain.get("stops", ()))),
        )


def _joined(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same positions as disjoint intervals in order; neighbours are made one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out
