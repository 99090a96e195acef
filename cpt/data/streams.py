"""Where the windows of a source lie: new ones, those that the lineage consumed, and those that the model saw elsewhere.

A `Stream` is a corpus with its ledger entry: number, order and seed of its windows. Letters: S sequence length.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.permutation import Permutation
from cpt.data.replay import Declared
from cpt.lineage.ledger import Entry, Ledger
from cpt.parallel.seeds import derive_seed


@dataclass(frozen=True)
class Source:
    """A corpus as a stage uses it: `share` is relative to the other new sources of the stage.

    `max_epochs`: how often the lineage may go through it, this stage included. Left out, a run goes round as often as
    its tokens ask for, but reads nothing again that an ancestor consumed.
    `hold_out`: this share of it, at its end, is never trained on, and is scored as held-out text under its name.
    """

    corpus: Path
    share: Fraction = Fraction(1)
    max_epochs: Fraction | None = None
    hold_out: Fraction = Fraction(0)

    def faults(self) -> list[str]:
        """A share that cannot be met, epochs of nothing, nothing left to train on."""
        faults = [] if self.share > 0 else [f"share = {float(self.share)}: above 0; leave the source out instead"]
        if self.max_epochs is not None and self.max_epochs <= 0:
            faults.append(f"max_epochs = {float(self.max_epochs)}: above 0")
        if not 0 <= self.hold_out < 1:
            faults.append(f"hold_out = {float(self.hold_out)}: at least 0 and below 1")
        return faults


@dataclass(frozen=True)
class Stream:
    """One way of drawing windows: where draw n of this source lies."""

    name: str
    entry: Entry
    corpus: Corpus
    first_draw: int = 0  # draws of the endless order that the lineage had made before this stage
    epochs_elsewhere: Fraction = Fraction(0)  # what the lineage has read of the corpus in windows of other lengths

    def first_tokens(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The first token of the windows [n] at these positions [n] of an epoch's order."""
        order = Permutation(self.entry.num_windows, derive_seed(self.entry.seed, "epoch", epoch))
        offset = 0 if self.corpus.packed_length else epoch_offset(self.entry, epoch)  # bins begin where they begin
        return order(positions) * self.entry.sequence_length + offset

    def shortage(self, source: Source, number: int) -> str | None:
        """What is wrong with drawing `number` windows in a stage that uses `source` so; None if the corpus has them."""
        entry = self.entry
        in_all = entry.num_consumed + number
        if source.max_epochs is not None:
            most = int((source.max_epochs - self.epochs_elsewhere) * entry.num_windows)
            limit, way_out = f"max_epochs = {float(source.max_epochs):g}", "raise max_epochs"
        elif self.epochs_elsewhere:
            again = math.ceil(self.epochs_elsewhere + Fraction(in_all, entry.num_windows))
            return (
                f"sources.{self.name}: the lineage has read {float(self.epochs_elsewhere):.2f} epochs of it in windows "
                f"of another length, and which of its text is new cannot be told from these; set max_epochs = {again} "
                "to read it all the same, or sequence_length back"
            )
        else:
            most = -(-entry.num_inherited // entry.num_windows) * entry.num_windows or in_all
            again = -(-in_all // entry.num_windows)
            limit, way_out = "ancestors have read the rest", f"set max_epochs = {again} to read it again"
        if in_all <= most:
            return None
        return (
            f"sources.{self.name}: the stage asks for {number:,} windows and may draw "
            f"{max(0, most - entry.num_consumed):,}: {entry.num_consumed:,} of its {entry.num_windows:,} were consumed "
            f"before, {limit}; {way_out}, lower its share or the stage's tokens, or add text"
        )


def new_stream(name: str, source: Source, ledger: Ledger, sequence_length: int, stage_seed: int) -> Stream:
    """A source of a stage, from where the lineage stopped reading it. Raises Fault if it is not there or too short."""
    corpus = Corpus.open(source.corpus)
    _refuse_other_bins(str(source.corpus), corpus, sequence_length)
    num_windows = windows_an_epoch(corpus, sequence_length, source.hold_out)
    if num_windows < 1:
        raise Fault(
            f"{source.corpus} holds {corpus.num_tokens} tokens{' in all' if source.hold_out else ''}, less than two "
            f"windows of {sequence_length + 1}; lower sequence_length or add text"
        )
    place = os.path.abspath(source.corpus)  # a descendant may be started in another folder
    of_corpus = [entry for entry in ledger.entries if entry.fingerprint == corpus.fingerprint]
    elsewhere = [entry for entry in of_corpus if entry.sequence_length != sequence_length]
    _refuse_part_held_out(name, source, corpus, sequence_length, elsewhere)
    entry = ledger.find(corpus.fingerprint, sequence_length)
    if entry is None:
        seed = derive_seed(stage_seed, name)
        entry = Entry(name, place, corpus.fingerprint, sequence_length, seed, num_windows)
    if entry.num_windows != num_windows:
        raise Fault(
            f"sources.{name}.hold_out = {float(source.hold_out)}: the lineage consumed {source.corpus} with another "
            f"part held out ({entry.num_windows} windows an epoch, now {num_windows}); set it back"
        )
    entry = replace(entry, corpus=place)  # it may have been moved since
    epochs_elsewhere = sum((Fraction(e.num_consumed, e.num_windows) for e in elsewhere), Fraction(0))
    return Stream(name, entry, corpus, entry.num_consumed, epochs_elsewhere)


def _refuse_part_held_out(
    name: str, source: Source, corpus: Corpus, sequence_length: int, elsewhere: Sequence[Entry]
) -> None:
    """Raise Fault if what the lineage held out when it cut the corpus into other windows would be trained on now."""
    stop = trained_tokens(corpus, sequence_length, source.hold_out)
    for entry in elsewhere:
        trained = (entry.num_windows + 2) * entry.sequence_length
        if stop > trained:
            raise Fault(
                f"sources.{name}: the lineage held out what lies behind token {trained:,} of {source.corpus} when it "
                f"read it at sequence_length {entry.sequence_length}; set hold_out = "
                f"{1 - trained / corpus.num_tokens:.4f} or more"
            )


def _refuse_other_bins(where: str, corpus: Corpus, sequence_length: int) -> None:
    """Raise Fault if a packed corpus has bins of another length than the windows."""
    if corpus.packed_length not in (None, sequence_length):
        raise Fault(
            f"{where} was packed for sequence_length {corpus.packed_length}, not {sequence_length}; set that, "
            "or pack the corpus again"
        )


def past_stream(entry: Entry, sequence_length: int, at_hand: Mapping[str, Corpus]) -> Stream:
    """What the lineage consumed of a source; `at_hand`: corpora that are open, by fingerprint.

    Raises Fault if the corpus is gone, has changed, or was cut into windows of another length.
    """
    if entry.sequence_length != sequence_length:
        raise Fault(
            f"the lineage consumed {entry.source} at sequence_length {entry.sequence_length}; replay draws those "
            f"windows and cannot cut them to {sequence_length}: set sequence_length back, or leave replay out"
        )
    try:
        corpus = at_hand.get(entry.fingerprint) or Corpus.open(entry.corpus)
    except Fault as fault:
        raise Fault(
            f"replay of {entry.source}: {line}; if it was moved, say where it lies now: replay.declared: "
            f"{{{entry.source}: {{corpus: PATH}}}}"
            for line in fault.lines
        ) from None
    if corpus.fingerprint != entry.fingerprint:
        raise Fault(
            f"{entry.corpus} has changed since the lineage consumed it as {entry.source}: replay would draw other "
            "text; put the corpus of that time back, or leave replay out"
        )
    return Stream(f"replay/{entry.source}", entry, corpus)


def declared_stream(name: str, declared: Declared, sequence_length: int, held_out_from: Mapping[str, int]) -> Stream:
    """A corpus, or the beginning of it, as if the lineage had consumed it in one epoch. Raises Fault if it cannot.

    `held_out_from`: by fingerprint, the first token that this stage or the lineage holds out, which is not replayed.
    """
    where = f"replay.declared.{name}"
    try:
        corpus = Corpus.open(declared.corpus)
    except Fault as fault:
        raise Fault(f"{where}: {line}" for line in fault.lines) from None
    tokens = corpus.num_tokens if declared.tokens is None else declared.tokens
    if tokens > corpus.num_tokens:
        raise Fault(f"{where}.tokens = {tokens}: {declared.corpus} holds {corpus.num_tokens}; leave it out for all")
    _refuse_other_bins(f"{where}.corpus = {declared.corpus}", corpus, sequence_length)
    tokens = min(tokens, held_out_from.get(corpus.fingerprint, tokens))
    num_windows = (tokens - 1) // sequence_length
    if num_windows < 1:
        raise Fault(f"{where}: {tokens} tokens are not one window of {sequence_length + 1}")
    seed = derive_seed("declared", corpus.fingerprint)  # the same in every run, so that a reservoir over it is
    entry = Entry(name, str(declared.corpus), corpus.fingerprint, sequence_length, seed, num_windows)
    return Stream(f"replay/{name}", entry.with_draws(0, num_windows), corpus)


def with_names_of_their_own(streams: list[Stream]) -> list[Stream]:
    """The streams, numbered where runs of the lineage called different corpora the same: loss is told by name."""
    names = [stream.name for stream in streams]
    before = [names[:index].count(name) for index, name in enumerate(names)]
    return [
        replace(stream, name=f"{stream.name}-{number + 1}") if number else stream
        for stream, number in zip(streams, before, strict=True)
    ]


def trained_tokens(corpus: Corpus, sequence_length: int, hold_out: Fraction = Fraction(0)) -> int:
    """Tokens from the beginning of a corpus that are trained on; what is held out begins with a whole window."""
    if not hold_out:
        return corpus.num_tokens
    return int(corpus.num_tokens * (1 - hold_out)) // sequence_length * sequence_length


def windows_an_epoch(corpus: Corpus, sequence_length: int, hold_out: Fraction = Fraction(0)) -> int:
    """Windows of a corpus in every epoch: as many as fit wherever the epoch's first window begins.

    Of a packed corpus, whose windows always begin with a bin, all bins.
    """
    tokens = trained_tokens(corpus, sequence_length, hold_out)
    if corpus.packed_length:
        return tokens // sequence_length
    return max(0, (tokens - 1 - (sequence_length - 1)) // sequence_length)


def epoch_offset(entry: Entry, epoch: int) -> int:
    """Where an epoch's first window begins, in tokens: 0 in the first epoch, elsewhere in each later one."""
    return derive_seed(entry.seed, "offset", epoch) % entry.sequence_length if epoch else 0
