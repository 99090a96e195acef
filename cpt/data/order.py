"""Which window stands in each slot of a stage: a pure function of (settings, seed, ledger before the stage, slot).

    slot --mixture--> source, n-th draw --new:    position n of its endless shuffled order, after what was consumed
                                        --replay: position n of a shuffle of everything the ledger held
                      --> (corpus, first token)

No rank, batch size, worker or ZeRO stage occurs here, so none of them can change what is trained on.
Letters: N slots asked for, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.mixture import Mixture
from cpt.data.permutation import Permutation
from cpt.lineage.ledger import Entry, Ledger
from cpt.parallel.seeds import derive_seed


@dataclass(frozen=True)
class Source:
    """A corpus as a stage uses it: `share` is relative to the other new sources of the stage."""

    corpus: Path
    share: Fraction = Fraction(1)

    def faults(self) -> list[str]:
        """A share that cannot be met."""
        return [] if self.share > 0 else [f"share = {float(self.share)}: above 0; leave the source out instead"]


@dataclass(frozen=True)
class Replay:
    """Windows drawn from what the lineage consumed before this stage, as `share` of all windows of the stage.

    `accounting`: `adds_to_new` spends the stage's tokens on new windows and replays on top of them;
    `replaces_new` takes the replayed tokens out of the stage's tokens.
    """

    share: Fraction = Fraction(0)
    accounting: Literal["replaces_new", "adds_to_new"] = "replaces_new"

    def faults(self) -> list[str]:
        """A share that leaves nothing new."""
        return [] if 0 <= self.share < 1 else [f"share = {float(self.share)}: at least 0 and below 1"]


@dataclass(frozen=True)
class _Stream:
    """One way of drawing windows: where draw n of this source lies."""

    name: str
    entry: Entry
    corpus: Corpus
    first_draw: int = 0  # draws of the endless order that the lineage had made before this stage


@dataclass(frozen=True)
class Windows:
    """The windows of N slots: `stream` [N] numbers the sources, `first_token` [N] is a place in the source's corpus."""

    stream: np.ndarray
    first_token: np.ndarray


class StageOrder:
    """The order of one stage. `ledger`: what the lineage had consumed when the stage began.

    Sources are numbered: the new ones as the stage names them, then one for each entry that replay may draw from, named
    `replay/<source>`. Raises Fault with everything that cannot work: a corpus that is not there or too short, replay
    without a past, a corpus of the past that has changed since or was cut into windows of another length.
    """

    def __init__(
        self, sources: Mapping[str, Source], replay: Replay | None, ledger: Ledger, sequence_length: int, seed: int
    ) -> None:
        self.sequence_length = sequence_length
        self._ledger = ledger
        self._seed = seed
        self._replay_share = replay.share if replay else Fraction(0)
        self._pools: dict[int, Permutation] = {}
        faults: list[str] = []
        new = [self._try(self._new_stream, faults, name, source) for name, source in sources.items()]
        at_hand = {stream.corpus.fingerprint: stream.corpus for stream in new if stream}
        entries = ledger.entries if self._replay_share else ()
        past = [self._try(self._past_stream, faults, entry, at_hand) for entry in entries]
        if self._replay_share and not ledger.entries:
            faults.append(
                "replay.share is above 0, but the lineage has consumed nothing yet; name a parent, or leave replay out"
            )
        shares = [source.share for source in sources.values()]
        try:
            total = sum(shares, Fraction(0)) or Fraction(1)
            self.mixture = Mixture([s / total * (1 - self._replay_share) for s in shares] + [self._replay_share])
        except ValueError as error:
            faults.append(str(error))
        prints = [stream.corpus.fingerprint for stream in new if stream]
        faults.extend(
            f"{stream.corpus.path} is named twice in this stage; give it one source with the sum of the shares"
            for index, stream in enumerate(filter(None, new))
            if stream.corpus.fingerprint in prints[:index]
        )
        if faults:
            raise Fault(faults)
        self._num_new = len(new)
        self._streams: list[_Stream] = [*new, *_with_names_of_their_own(past)]
        # Everything replay may draw from, one row an interval: stream, epoch, first position; and where a row begins.
        rows = [
            (self._num_new + i, *interval) for i, stream in enumerate(past) for interval in stream.entry.intervals()
        ]
        self._rows = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        self._row_starts = np.cumsum([0, *(stop - start for _, _, start, stop in rows)])

    @property
    def source_names(self) -> list[str]:
        """Name of each numbered source."""
        return [stream.name for stream in self._streams]

    @property
    def corpora(self) -> list[Corpus]:
        """Corpus of each numbered source."""
        return [stream.corpus for stream in self._streams]

    @property
    def num_replayable(self) -> int:
        """Windows that replay draws from before it begins again in another order."""
        return int(self._row_starts[-1])

    def windows(self, first_slot: int, num_slots: int) -> Windows:
        """The windows of `num_slots` slots from `first_slot` on, in order."""
        slots = np.arange(first_slot, first_slot + num_slots, dtype=np.int64)
        of_mixture, draws = self.mixture.sources(slots), self.mixture.draws(slots)
        stream = of_mixture.copy()
        epoch, position = np.zeros_like(slots), np.zeros_like(slots)
        for index in range(self._num_new):
            at = np.flatnonzero(of_mixture == index)
            here = self._streams[index]
            epoch[at], position[at] = np.divmod(draws[at] + here.first_draw, here.entry.num_windows)
        at = np.flatnonzero(of_mixture == self._num_new)
        if len(at):
            stream[at], epoch[at], position[at] = self._replayed(draws[at])
        return Windows(stream, self._first_tokens(stream, epoch, position))

    def ledger_after(self, num_slots: int) -> Ledger:
        """The lineage's ledger when `num_slots` slots of this stage have been trained on."""
        ledger = self._ledger
        for stream, number in zip(self._streams[: self._num_new], self.mixture.counts(num_slots), strict=False):
            if number:
                ledger = ledger.with_entry(stream.entry.with_draws(stream.first_draw, number))
        return ledger

    def identities(self, windows: Windows) -> list[tuple[str, int, int]]:
        """What the order chain hashes: (fingerprint, first token, number of tokens) of each window."""
        prints = [stream.corpus.fingerprint for stream in self._streams]
        return [
            (prints[stream], int(first), self.sequence_length + 1)
            for stream, first in zip(windows.stream.tolist(), windows.first_token.tolist(), strict=True)
        ]

    def _new_stream(self, name: str, source: Source) -> _Stream:
        corpus = Corpus.open(source.corpus)
        num_windows = windows_an_epoch(corpus, self.sequence_length)
        if num_windows < 1:
            raise Fault(
                f"{source.corpus} holds {corpus.num_tokens} tokens, less than two windows of "
                f"{self.sequence_length + 1}; lower sequence_length or add text"
            )
        entry = self._ledger.find(corpus.fingerprint, self.sequence_length)
        if entry is None:
            entry = Entry(
                name,
                str(source.corpus),
                corpus.fingerprint,
                self.sequence_length,
                derive_seed(self._seed, name),
                num_windows,
            )
        entry = replace(entry, corpus=str(source.corpus))  # it may have been moved since
        return _Stream(name, entry, corpus, first_draw=entry.num_consumed)

    def _past_stream(self, entry: Entry, at_hand: Mapping[str, Corpus]) -> _Stream:
        if entry.sequence_length != self.sequence_length:
            raise Fault(
                f"the lineage consumed {entry.source} at sequence_length {entry.sequence_length}; replay draws those "
                f"windows and cannot cut them to {self.sequence_length}: set sequence_length back, or leave replay out"
            )
        try:
            corpus = at_hand.get(entry.fingerprint) or Corpus.open(entry.corpus)
        except Fault as fault:
            raise Fault(f"replay of {entry.source}: {line}" for line in fault.lines) from None
        if corpus.fingerprint != entry.fingerprint:
            raise Fault(
                f"{entry.corpus} has changed since the lineage consumed it as {entry.source}: replay would draw other "
                "text; put the corpus of that time back, or leave replay out"
            )
        return _Stream(f"replay/{entry.source}", entry, corpus)

    @staticmethod
    def _try(make: Callable[..., _Stream], faults: list[str], *arguments: object) -> _Stream | None:
        try:
            return make(*arguments)
        except Fault as fault:
            faults.extend(fault.lines)
            return None

    def _replayed(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream, epoch and position of these draws; a pool that has gone round is shuffled anew."""
        rounds, within = np.divmod(draws, self.num_replayable)
        place = np.empty_like(draws)
        for number in np.unique(rounds):
            if int(number) not in self._pools:
                self._pools[int(number)] = Permutation(
                    self.num_replayable, derive_seed(self._seed, "replay", int(number))
                )
            at = rounds == number
            place[at] = self._pools[int(number)](within[at])
        row = np.searchsorted(self._row_starts, place, side="right") - 1
        return self._rows[row, 0], self._rows[row, 1], self._rows[row, 2] + place - self._row_starts[row]

    def _first_tokens(self, stream: np.ndarray, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
        first = np.empty_like(position)
        for index, number in np.unique(np.stack([stream, epoch]), axis=1).T.tolist():
            at = (stream == index) & (epoch == number)
            entry = self._streams[index].entry
            order = Permutation(entry.num_windows, derive_seed(entry.seed, "epoch", number))
            first[at] = order(position[at]) * self.sequence_length + epoch_offset(entry, number)
        return first


def _with_names_of_their_own(streams: list[_Stream]) -> list[_Stream]:
    """The streams, numbered where runs of the lineage called different corpora the same: loss is told by name."""
    names = [stream.name for stream in streams]
    before = [names[:index].count(name) for index, name in enumerate(names)]
    return [
        replace(stream, name=f"{stream.name}-{number + 1}") if number else stream
        for stream, number in zip(streams, before, strict=True)
    ]


def windows_an_epoch(corpus: Corpus, sequence_length: int) -> int:
    """Windows of a corpus in every epoch: as many as fit wherever the epoch's first window begins."""
    return corpus.num_windows(sequence_length, offset=sequence_length - 1)


def epoch_offset(entry: Entry, epoch: int) -> int:
    """Where an epoch's first window begins, in tokens: 0 in the first epoch, elsewhere in each later one."""
    return derive_seed(entry.seed, "offset", epoch) % entry.sequence_length if epoch else 0
