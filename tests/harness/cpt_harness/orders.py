"""Orders of stages over numbered corpora, and what they draw."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from cpt.data.corpus import Corpus
from cpt.data.order import StageOrder
from cpt.data.replay import Replay
from cpt.data.streams import Source, windows_an_epoch
from cpt.lineage.ledger import Entry, Ledger
from cpt_harness.numbered import numbered_corpus

LENGTH = 8
NOTHING = Ledger()


def make_corpora(folder: Path) -> Path:
    """`old` of 401 tokens from 0, `new` of 777 from 10,000 in three shards, `other` of 215 from 20,000."""
    numbered_corpus(folder / "old", 401)
    numbered_corpus(folder / "new", 777, first=10_000, num_shards=3)
    numbered_corpus(folder / "other", 215, first=20_000)
    return folder


def order_of(
    corpora: Path, shares: dict[str, str | int], ledger: Ledger = NOTHING, replay="0", seed=1, length=LENGTH
) -> StageOrder:
    """The order of a stage over the corpora of these names, with these shares."""
    sources = {name: Source(corpora / name, Fraction(share)) for name, share in shares.items()}
    return StageOrder(sources, Replay(Fraction(replay)), ledger, length, seed)


def entry_of(corpora: Path, name: str, num_consumed: int, seed: int = 99) -> Entry:
    """The entry of a ledger after that many windows of a corpus."""
    corpus = Corpus.open(corpora / name)
    number = windows_an_epoch(corpus, LENGTH)
    return Entry(name, str(corpora / name), corpus.fingerprint, LENGTH, seed, number).with_draws(0, num_consumed)


def drawn(order: StageOrder, num_slots: int, first_slot: int = 0) -> list[tuple[str, int]]:
    """Source and first token of each slot."""
    windows = order.windows(first_slot, num_slots)
    names = order.source_names
    return [(names[i], first) for i, first in zip(windows.stream.tolist(), windows.first_token.tolist(), strict=True)]


def drawn_of(order: StageOrder, name: str, num_slots: int) -> list[int]:
    """First tokens of the windows of one source among the first slots."""
    return [first for source, first in drawn(order, num_slots) if source == name]
