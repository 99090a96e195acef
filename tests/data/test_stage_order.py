"""Which window stands in each slot of a stage: every window once an epoch, whatever reads them and how many at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cpt_harness.numbered import VOCABULARY, numbered_corpus
from cpt_harness.orders import LENGTH, drawn, drawn_of, entry_of, make_corpora, order_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.data.check import open_corpora
from cpt.data.corpus import Corpus
from cpt.data.order import StageOrder
from cpt.data.permutation import Permutation
from cpt.data.replay import Replay
from cpt.data.streams import Source, epoch_offset, windows_an_epoch
from cpt.lineage.ledger import Entry, Ledger
from cpt.parallel.seeds import derive_seed


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def consumed(ledger: Ledger) -> dict[str, list[int]]:
    """First tokens of what a ledger says was consumed, by source, worked out anew from its intervals."""
    tokens: dict[str, list[int]] = {}
    for entry in ledger.entries:
        for epoch, start, stop in entry.intervals():
            order = Permutation(entry.num_windows, derive_seed(entry.seed, "epoch", epoch))
            windows = order(np.arange(start, stop)) * entry.sequence_length + epoch_offset(entry, epoch)
            tokens.setdefault(entry.source, []).extend(windows.tolist())
    return tokens


def test_every_window_of_a_source_is_drawn_once_an_epoch_and_epochs_differ(corpora):
    order = order_of(corpora, {"old": 1})
    an_epoch = windows_an_epoch(Corpus.open(corpora / "old"), LENGTH)
    assert an_epoch == (401 - 1 - (LENGTH - 1)) // LENGTH == 49
    epochs = np.array(drawn_of(order, "old", 6 * an_epoch)).reshape(6, an_epoch)
    offsets = [int(epoch.min()) for epoch in epochs]
    for epoch, offset in zip(epochs, offsets, strict=True):
        assert np.array_equal(np.sort(epoch), offset + LENGTH * np.arange(an_epoch))
        assert offset < LENGTH
        assert epoch.max() + LENGTH + 1 <= 401
    assert offsets[0] == 0
    assert len(set(offsets)) > 2
    assert (
        len({tuple(((epoch - offset) // LENGTH).tolist()) for epoch, offset in zip(epochs, offsets, strict=True)}) == 6
    )


@given(st.integers(1, 40), st.integers(1, 600))
def test_windows_of_an_epoch_fit_into_the_corpus_at_any_offset(length, num_tokens):
    corpus = Corpus.__new__(Corpus)
    corpus.num_tokens, corpus.manifest = num_tokens, None
    number = windows_an_epoch(corpus, length)
    assert number == 0 or (length - 1) + number * length + 1 <= num_tokens
    assert number + 1 >= corpus.num_windows(length)  # at most one window is given up for the offset


@pytest.mark.parametrize("shares", [{"old": "1/3", "new": "1/2", "other": "1/6"}, {"new": 7, "other": 1}])
def test_every_source_of_a_mixture_goes_round_on_its_own(corpora, shares):
    order = order_of(corpora, shares)
    for name in shares:
        firsts = drawn_of(order, name, 600)
        an_epoch = windows_an_epoch(Corpus.open(corpora / name), LENGTH)
        for epoch in range(len(firsts) // an_epoch):
            assert len(set(firsts[epoch * an_epoch : (epoch + 1) * an_epoch])) == an_epoch


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_an_order_read_in_any_portions_is_the_same(corpora, portions, first_slot):
    order = order_of(corpora, {"old": "2/3", "new": "1/3"}, Ledger((entry_of(corpora, "other", 13),)), "1/5")
    together = drawn(order, sum(portions), first_slot)
    apart = []
    for portion in portions:
        apart += drawn(order, portion, first_slot + len(apart))
    assert apart == together


def test_the_order_depends_on_the_seed_and_on_nothing_else(corpora):
    one, same, other = (drawn(order_of(corpora, {"old": 1, "new": 1}, seed=seed), 90) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [name for name, _ in one] == [name for name, _ in other]


@pytest.mark.parametrize("num_slots", [0, 1, 2, 3, 48, 49, 50, 97, 98, 200, 333])
def test_the_ledger_after_any_slot_holds_exactly_what_was_drawn(corpora, num_slots):
    order = order_of(corpora, {"old": "1/2", "new": "1/2"})
    told = consumed(order.ledger_after(num_slots))
    for name in ("old", "new"):
        assert sorted(told.get(name, [])) == sorted(drawn_of(order, name, num_slots))


def test_the_ledger_of_a_child_holds_what_it_and_its_parent_drew_and_nothing_replayed(corpora):
    parent = order_of(corpora, {"old": 1})
    child = order_of(corpora, {"old": "1/4", "new": "3/4"}, parent.ledger_after(70), "1/3", seed=8)
    told = consumed(child.ledger_after(123))
    assert sorted(told["old"]) == sorted(drawn_of(parent, "old", 70) + drawn_of(child, "old", 123))
    assert sorted(told["new"]) == sorted(drawn_of(child, "new", 123))
    assert set(told) == {"old", "new"}


@pytest.mark.parametrize("num_before", [1, 20, 48, 49, 50, 130])
def test_a_child_goes_on_where_its_parent_stopped_in_mid_epoch(corpora, num_before):
    parent = order_of(corpora, {"old": 1})
    child = order_of(corpora, {"old": "1/2", "new": "1/2"}, parent.ledger_after(num_before), seed=77)
    both = drawn_of(parent, "old", num_before) + drawn_of(child, "old", 300)
    assert both == drawn_of(parent, "old", len(both))


def test_a_second_stage_over_the_same_source_goes_on_too(corpora):
    first = order_of(corpora, {"new": "1/2", "other": "1/2"}, seed=1)
    second = order_of(corpora, {"new": "1"}, first.ledger_after(61), seed=2)
    firsts = drawn_of(first, "new", 61) + drawn_of(second, "new", 50)
    assert len(set(firsts)) == len(firsts)


def test_a_child_under_another_name_does_not_read_again_what_its_parent_read(corpora):
    parent = order_of(corpora, {"old": 1})
    child = StageOrder({"renamed": Source(corpora / "old")}, None, parent.ledger_after(30), LENGTH, 5)
    assert not set(drawn_of(parent, "old", 30)) & set(drawn_of(child, "renamed", 19))
    assert len(child.ledger_after(19).entries) == 1


def test_replay_draws_only_what_the_ledger_held_each_window_once_before_any_again(corpora):
    parent = order_of(corpora, {"old": 1})
    ledger = parent.ledger_after(30)
    child = order_of(corpora, {"new": 1}, ledger, "1/4")
    assert child.num_replayable == 30
    assert child.source_names == ["new", "replay/old"]
    replayed = drawn_of(child, "replay/old", 4 * 90)
    rounds = [replayed[start : start + 30] for start in (0, 30, 60)]
    for one_round in rounds:
        assert sorted(one_round) == sorted(drawn_of(parent, "old", 30))
    assert len({tuple(one_round) for one_round in rounds}) == 3


def test_replay_over_several_epochs_of_the_past_draws_each_of_their_windows(corpora):
    parent = order_of(corpora, {"old": 1})
    child = order_of(corpora, {"new": 1}, parent.ledger_after(120), "1/2")
    assert sorted(drawn_of(child, "replay/old", 240)) == sorted(drawn_of(parent, "old", 120))


def test_replay_of_a_grandchild_draws_from_both_ancestors(corpora):
    parent = order_of(corpora, {"old": 1}, seed=1)
    child = order_of(corpora, {"new": 1}, parent.ledger_after(25), "1/5", seed=2)
    ledger = child.ledger_after(40)
    grandchild = order_of(corpora, {"other": 1}, ledger, "1/2", seed=3)
    assert grandchild.source_names == ["other", "replay/old", "replay/new"]
    pool = grandchild.num_replayable
    assert pool == 25 + 32
    replayed = [pair for pair in drawn(grandchild, 2 * pool) if pair[0] != "other"]
    assert sorted(first for name, first in replayed if name == "replay/old") == sorted(drawn_of(parent, "old", 25))
    assert sorted(first for name, first in replayed if name == "replay/new") == sorted(drawn_of(child, "new", 40))


def test_replay_is_mixed_over_the_ancestors_and_not_one_after_the_other(corpora):
    ledger = Ledger((entry_of(corpora, "old", 40), entry_of(corpora, "other", 20)))
    order = order_of(corpora, {"new": 1}, ledger, "1/2")
    replayed = [name for name, _ in drawn(order, 120) if name != "new"]
    assert 3 < replayed[:30].count("replay/other") < 17  # 10 expected


@pytest.mark.parametrize("share", ["1/4", "1/100", "1/2", "99/100"])
def test_shares_of_new_sources_are_of_what_replay_leaves(corpora, share):
    ledger = Ledger((entry_of(corpora, "other", 20),))
    order = order_of(corpora, {"old": 1, "new": 3}, ledger, share)
    left = 1 - Fraction(share)
    assert order.mixture.shares == [left / 4, left * 3 / 4, Fraction(share)]


def test_without_a_share_nothing_is_replayed(corpora):
    ledger = Ledger((entry_of(corpora, "old", 20),))
    order = order_of(corpora, {"new": 1}, ledger, "0")
    assert order.source_names == ["new"]
    assert StageOrder({"new": Source(corpora / "new")}, None, ledger, LENGTH, 1).source_names == ["new"]


def test_sources_that_ancestors_called_the_same_are_told_apart(corpora):
    one, two = entry_of(corpora, "old", 20), entry_of(corpora, "other", 20)
    renamed = Entry("old", two.corpus, two.fingerprint, LENGTH, two.seed, two.num_windows, two.epochs)
    assert order_of(corpora, {"new": 1}, Ledger((one, renamed)), "1/2").source_names == [
        "new", "replay/old", "replay/old-2",
    ]  # fmt: skip


def test_a_corpus_that_was_moved_is_known_again_and_the_ledger_learns_its_new_place(corpora, tmp_path):
    parent = order_of(corpora, {"old": 1})
    moved = numbered_corpus(tmp_path / "moved", 401)
    before = parent.ledger_after(30)
    gone = Ledger((Entry(**{**vars(before.entries[0]), "corpus": str(tmp_path / "gone")}),))
    child = StageOrder({"old": Source(moved)}, Replay(Fraction(1, 2)), gone, LENGTH, 2)
    assert not set(drawn_of(child, "old", 30)) & set(drawn_of(parent, "old", 30))
    after = child.ledger_after(10)
    assert [entry.corpus for entry in after.entries] == [str(moved)]
    assert after.entries[0].num_consumed == 35


def test_identities_name_corpus_place_and_length(corpora):
    order = order_of(corpora, {"old": 1, "new": 1})
    windows = order.windows(0, 6)
    prints = {name: Corpus.open(corpora / name).fingerprint for name in ("old", "new")}
    assert order.identities(windows) == [(prints[name], first, LENGTH + 1) for name, first in drawn(order, 6)]


def packed(folder: Path, length: int = LENGTH) -> Path:
    """A corpus of 401 tokens that says of itself that it was packed."""
    return numbered_corpus(folder, 401, packed_length=length)


def test_windows_of_a_packed_corpus_are_its_bins_in_every_epoch(tmp_path):
    order = StageOrder({"packed": Source(packed(tmp_path / "packed"))}, None, Ledger(), LENGTH, 1)
    firsts = drawn_of(order, "packed", 150)
    for epoch in range(3):
        assert sorted(firsts[50 * epoch : 50 * epoch + 50]) == list(range(0, 400, LENGTH))


def test_a_corpus_packed_for_another_length_is_refused(tmp_path):
    with pytest.raises(Fault, match="was packed for sequence_length 16, not 8; set that, or pack the corpus again"):
        StageOrder({"packed": Source(packed(tmp_path / "packed", 16))}, None, Ledger(), LENGTH, 1)


def test_a_packed_corpus_is_refused_where_attention_runs_across_documents(tmp_path):
    path = packed(tmp_path / "packed")
    open_corpora({"stages.0.sources.a": path}, VOCABULARY)
    with pytest.raises(Fault, match=r"stages.0.sources.a: .* is packed, and its padding is no text; set attention: w"):
        open_corpora({"stages.0.sources.a": path}, VOCABULARY, within_documents=False)


def test_the_order_is_the_same_in_every_version(corpora):
    """Runs of the past depend on it. Never change these."""
    ledger = Ledger((entry_of(corpora, "other", 20),))
    order = order_of(corpora, {"old": "1/2", "new": "1/2"}, ledger, "1/3")
    assert drawn(order, 12, 140) == [
        ("replay/other", 72),
        ("old", 64),
        ("new", 160),
        ("replay/other", 136),
        ("old", 208),
        ("new", 24),
        ("replay/other", 152),
        ("old", 256),
        ("new", 568),
        ("replay/other", 48),
        ("old", 128),
        ("new", 416),
    ]


@pytest.mark.parametrize("replay", ["0", "1/4"])
def test_an_order_that_began_in_another_run_goes_on_from_there(corpora, replay):
    """The same windows, ledger and counts as of the whole stage, counted from slot 13 on."""
    ledger = Ledger((entry_of(corpora, "old", 20),))
    sources = {"new": Source(corpora / "new", Fraction(2)), "other": Source(corpora / "other")}
    settings = sources, Replay(Fraction(replay), scope="all_seen"), ledger, LENGTH, 3
    whole, rest = StageOrder(*settings), StageOrder(*settings, num_slots_before=13)
    assert drawn(rest, 90) == drawn(whole, 90, first_slot=13)
    assert rest.ledger_after(90) == whole.ledger_after(103)
    assert rest.counts(90) == [
        (before, then - before) for (_, before), (_, then) in zip(whole.counts(13), whole.counts(103), strict=True)
    ]
