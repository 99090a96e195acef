"""Which window stands in each slot of a stage: a pure function of (settings, seed, ledger, slot).

    slot --mixture--> source, n-th draw --new:    position n of its endless shuffled order, after what was consumed
                                        --replay: draw n of the pool of what was consumed (cpt/data/replay.py)
                      --> (corpus, first token)

Of the ledger it is what it was before the stage, and the changes of replay's share since, which are entries of it.
No rank, batch size, worker or ZeRO stage occurs here, so none of them can change what is trained on.
Letters: N slots asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from threading import Lock

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.mixture import LONGEST_PERIOD, Mixture, period_of
from cpt.data.ramp import RampedMixture
from cpt.data.replay import Pool, Replay
from cpt.data.spliced import SplicedMixture
from cpt.data.streams import (
    Source,
    Stream,
    declared_stream,
    new_stream,
    past_stream,
    trained_tokens,
    with_names_of_their_own,
)
from cpt.lineage.ledger import Ledger, ShareChange, Skipped
from cpt.parallel.seeds import derive_seed

# With `scope: all_seen` the pool is drawn up anew when it has grown by this part, and not more often than this.
_GROWTH = 8
_FEWEST_SLOTS = 64


@dataclass(frozen=True)
class Windows:
    """The windows of N slots: `stream` [N] numbers the sources, `first_token` [N] is a place in the source's corpus."""

    stream: np.ndarray
    first_token: np.ndarray


class StageOrder:
    """The order of one stage. `ledger`: what the lineage had consumed when the stage began.

    `num_slots_before`: the stage began in another run, so many slots ago; all that is asked here counts from there on.
    `share_changes`: of replay in this stage so far, oldest first. What lies before a change is as it was without it.
    `skipped`: slots of this stage that nothing is learned from; new windows there are consumed and never replayed.
    Sources are numbered: the new ones as the stage names them, then one for each entry that replay may draw from, named
    `replay/<source>`. Raises Fault with everything that cannot work: a corpus that is not there or too short, replay
    without a past, a corpus of the past that has changed since or was cut into windows of another length.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        replay: Replay | None,
        ledger: Ledger,
        sequence_length: int,
        seed: int,
        num_slots_before: int = 0,
        share_changes: Sequence[ShareChange] = (),
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.sequence_length, self._num_slots_before = sequence_length, num_slots_before
        self._sources, self._replay = sources, replay or Replay()
        self._ledger, self._seed, self._share_changes, self._skipped = ledger, seed, share_changes, skipped
        faults: list[str] = []
        self._new = self._made(
            faults, *((new_stream, name, source, ledger, sequence_length, seed) for name, source in sources.items())
        )
        past = self._past_streams(faults) if self._replay.is_used else []
        self.mixture = self._mixture(faults)
        prints = [stream.corpus.fingerprint for stream in self._new]
        faults.extend(
            f"{stream.corpus.path} is named twice in this stage; give it one source with the sum of the shares"
            for index, stream in enumerate(self._new)
            if stream.corpus.fingerprint in prints[:index]
        )
        if faults:
            raise Fault(faults)
        self._streams = [*self._new, *with_names_of_their_own(past)]
        self._pools = {0: self._pool_after(0, seed)}
        self._pool_starts = [0]  # the first slot that draws from each pool
        self._lock = Lock()  # a loader's threads share the pools
        if self._replay.is_used and not self.num_replayable:
            raise Fault("replay.from: nothing of it was consumed when the stage begins; name a source of the past too")

    @property
    def source_names(self) -> list[str]:
        """Name of each numbered source."""
        return [stream.name for stream in self._streams]

    @property
    def corpora(self) -> list[Corpus]:
        """Corpus of each numbered source."""
        return [stream.corpus for stream in self._streams]

    @property
    def streams(self) -> list[Stream]:
        """The numbered sources: new ones first, in the order of the settings."""
        return self._streams

    @property
    def num_replayable(self) -> int:
        """Windows that replay draws from when the stage begins."""
        return len(self._pools[0])

    def windows(self, first_slot: int, num_slots: int) -> Windows:
        """The windows of `num_slots` slots from `first_slot` on, in order."""
        stream, epoch, position = self._places(first_slot, num_slots)
        return Windows(stream, self._first_tokens(stream, epoch, position))

    def epochs(self, first_slot: int, num_slots: int) -> np.ndarray:
        """Of the windows of these slots, which epoch of their source they are from: [num_slots]."""
        return self._places(first_slot, num_slots)[1]

    def slot_of_stage(self, first_slot: int) -> int:
        """The same slot, counted from where the stage first began."""
        return self._num_slots_before + first_slot

    def skipped_in(self, first_slot: int, num_slots: int) -> Skipped | None:
        """The first of the skipped that have any of these slots; None if all of them are to be trained on."""
        first = self.slot_of_stage(first_slot)
        found = (one for one in self._skipped if one.window < first + num_slots and first < one.stop)
        return next(found, None)

    def _places(self, first_slot: int, num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream, epoch and position of the windows of these slots."""
        slots = np.arange(num_slots, dtype=np.int64) + self.slot_of_stage(first_slot)
        of_mixture, draws = self.mixture.sources(slots), self.mixture.draws(slots)
        stream = of_mixture.copy()
        epoch, position = np.zeros_like(slots), np.zeros_like(slots)
        for index, new in enumerate(self._new):
            at = np.flatnonzero(of_mixture == index)
            epoch[at], position[at] = np.divmod(draws[at] + new.first_draw, new.entry.num_windows)
        at = np.flatnonzero(of_mixture == len(self._new))
        if len(at):
            stream[at], epoch[at], position[at] = self._replayed(slots[at], draws[at])
        return stream, epoch, position

    def ledger_after(self, num_slots: int) -> Ledger:
        """The lineage's ledger when `num_slots` slots of this stage have gone by."""
        return self._ledger_at(self._num_slots_before + num_slots)

    def counts(self, num_slots: int) -> list[tuple[int, int]]:
        """By new source, and last of all for replay: windows drawn before, and in the next `num_slots` slots."""
        before, after = (self.mixture.counts(self._num_slots_before + number) for number in (0, num_slots))
        return [(drawn, then - drawn) for drawn, then in zip(before, after, strict=True)]

    def _ledger_at(self, num_slots: int) -> Ledger:
        """The ledger after so many slots of the stage, from its very beginning."""
        ledger = self._ledger
        skipped = [(self.mixture.counts(s.window), self.mixture.counts(min(s.stop, num_slots))) for s in self._skipped]
        for index, (stream, number) in enumerate(zip(self._new, self.mixture.counts(num_slots), strict=False)):
            if number:
                entry = stream.entry.with_draws(stream.first_draw, number)
                for before, after in skipped:  # none, or less than none, of those to come
                    entry = entry.with_skipped(stream.first_draw + before[index], after[index] - before[index])
                ledger = ledger.with_entry(entry)
        return ledger

    def faults_over(self, num_slots: int) -> list[str]:
        """Sources whose share their corpus cannot meet over a stage of that many slots, as `max_epochs` limits it."""
        numbers = self.mixture.counts(self._num_slots_before + num_slots)
        asked = zip(self._new, self._sources.values(), numbers, strict=False)
        shortages = (stream.shortage(source, number) for stream, source, number in asked)
        return [shortage for shortage in shortages if shortage]

    def identities(self, windows: Windows) -> list[tuple[str, int, int]]:
        """What the order chain hashes: (fingerprint, first token, number of tokens) of each window."""
        prints = [stream.corpus.fingerprint for stream in self._streams]
        return [
            (prints[stream], int(first), self.sequence_length + 1)
            for stream, first in zip(windows.stream.tolist(), windows.first_token.tolist(), strict=True)
        ]

    def _mixture(self, faults: list[str]) -> Mixture | RampedMixture | SplicedMixture | None:
        shares, replay = [source.share for source in self._sources.values()], self._replay
        if not shares:
            return None  # a fault of the settings, told there
        total = sum(shares)
        try:
            if replay.ramp:
                num_slots = -(-replay.ramp.tokens // self.sequence_length)
                mixture = RampedMixture(shares, replay.ramp.start, replay.share, num_slots)
            else:
                mixture = _mixture_with(shares, replay.share)
            changed = [(change.window, _mixture_with(shares, change.share)) for change in self._share_changes]
            return SplicedMixture([(0, mixture), *changed]) if changed else mixture
        except ValueError:
            told = ", ".join(f"{name} {float(source.share):g}" for name, source in self._sources.items())
            faults.append(
                f"sources: the shares {told} (together {float(total):g}) repeat only after {period_of(shares):,} "
                f"windows, and can be kept exactly up to {LONGEST_PERIOD:,}; write them with fewer digits, or "
                "let them sum to 1"
            )
            return None

    def _past_streams(self, faults: list[str]) -> list[Stream]:
        """One stream for each entry that replay may draw from, and each declared corpus."""
        replay, at_hand = self._replay, {stream.corpus.fingerprint: stream.corpus for stream in self._new}
        entries = {entry.key: entry for entry in self._ledger.entries}
        if replay.scope == "all_seen":
            entries.update((s.entry.key, s.entry) for s in self._new if s.entry.key not in entries)
        known = dict.fromkeys([*(entry.source for entry in entries.values()), *replay.declared])
        faults.extend(
            f"replay.from: nothing called {name} was consumed or is declared; there is {', '.join(known) or 'nothing'}"
            for name in ([] if replay.from_ == "ancestors" else replay.from_)
            if name not in known
        )
        if not self._ledger.entries and not replay.declared:
            faults.append(
                "replay.share is above 0, but the lineage has consumed nothing yet; name a parent, declare in "
                "replay.declared what the model saw elsewhere, or leave replay out"
            )
        declared = {name: seen for name, seen in replay.declared.items() if replay.takes(name)}
        elsewhere = self._made(
            faults, *((declared_stream, n, d, self.sequence_length, self._held_out_from()) for n, d in declared.items())
        )
        # A declared corpus that the ledger has too only says where it lies now.
        at_hand.update({stream.corpus.fingerprint: stream.corpus for stream in elsewhere})
        past = self._made(
            faults,
            *((past_stream, e, self.sequence_length, at_hand) for e in entries.values() if replay.takes(e.source)),
        )
        known_again = {stream.corpus.fingerprint for stream in past}
        return [*past, *(stream for stream in elsewhere if stream.corpus.fingerprint not in known_again)]

    def _held_out_from(self) -> dict[str, int]:
        """By fingerprint the first token that the lineage or this stage holds out, if it holds out anything."""
        limits = {e.fingerprint: (e.num_windows + 1) * e.sequence_length for e in self._ledger.entries}
        for stream in self._new:
            hold_out = self._sources[stream.name].hold_out
            if hold_out:
                limits[stream.corpus.fingerprint] = trained_tokens(stream.corpus, self.sequence_length, hold_out)
        return limits

    @staticmethod
    def _made(faults: list[str], *calls: tuple[Callable[..., Stream], ...]) -> list[Stream]:
        """What the calls, each a function and its arguments, make; what is wrong with the others goes to `faults`."""
        made = []
        for make, *arguments in calls:
            try:
                made.append(make(*arguments))
            except Fault as fault:
                faults.extend(fault.lines)
        return made

    def _pool_after(self, num_slots: int, seed: int) -> Pool:
        """What replay draws from when that many slots of the stage have been trained on."""
        consumed = {entry.key: entry for entry in self._ledger_at(num_slots).entries}
        numbered = list(enumerate(self._streams))[len(self._new) :]
        return Pool([(n, consumed.get(stream.entry.key, stream.entry)) for n, stream in numbered], self._replay, seed)

    def _replayed(self, slots: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream, epoch and position of replayed slots, ascending, and their draws."""
        if self._replay.scope == "past_only":
            return self._pools[0](draws)
        stream, epoch, position = np.empty_like(slots), np.empty_like(slots), np.empty_like(slots)
        with self._lock:
            self._extend_pool_starts(int(slots[-1]))
            of_slot = np.searchsorted(self._pool_starts, slots, side="right") - 1
            for number in np.unique(of_slot).tolist():
                start, at = self._pool_starts[number], of_slot == number
                if number not in self._pools:
                    kept = {old: self._pools[old] for old in (0, max(self._pools))}  # a batch may lie across two
                    seed = derive_seed(self._seed, "replay after", number)
                    self._pools = {**kept, number: self._pool_after(start, seed)}
                drawn_before = self.mixture.counts(start)[-1]
                stream[at], epoch[at], position[at] = self._pools[number](draws[at] - drawn_before)
        return stream, epoch, position

    def _extend_pool_starts(self, last_slot: int) -> None:
        """Fix the slots at which the pool is drawn up anew, up to a slot: functions of the counts alone."""
        at_first = sum(stream.entry.num_consumed for stream in self._streams[len(self._new) :])
        while self._pool_starts[-1] <= last_slot:
            start = self._pool_starts[-1]
            size = at_first + sum(self.mixture.counts(start)[:-1])
            self._pool_starts.append(start + max(_FEWEST_SLOTS, -(-size // _GROWTH)))

    def _first_tokens(self, stream: np.ndarray, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
        first = np.empty_like(position)
        # One key for both: finding pairs that are alike takes numpy five times as long as all the rest of this.
        num_epochs = int(epoch.max(initial=0)) + 1
        key = stream * num_epochs + epoch
        for which in np.unique(key).tolist():
            at = np.flatnonzero(key == which)
            index, number = divmod(which, num_epochs)
            first[at] = self._streams[index].first_tokens(number, position[at])
        return first


def _mixture_with(shares: Sequence[Fraction], replayed: Fraction) -> Mixture | RampedMixture:
    """Of new sources with these shares and, last, replay with a share of all."""
    total = sum(shares)
    together = [share / total * (1 - replayed) for share in shares] + [replayed]
    if period_of(together) <= LONGEST_PERIOD:
        return Mixture(together)
    return RampedMixture(shares, replayed, replayed, num_slots=0)
