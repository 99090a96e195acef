"""What replay may draw from and in which order: only what was consumed, each once before any again, or a reservoir."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cpt_harness.orders import LENGTH, drawn, drawn_of, entry_of, make_corpora, order_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.data.order import StageOrder
from cpt.data.replay import Declared, Pool, Ramp, Replay, reservoir
from cpt.data.streams import Source
from cpt.lineage.ledger import Entry, Ledger


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def order_with(corpora: Path, ledger: Ledger, share="1/2", new="new", seed=1, **replay) -> StageOrder:
    return StageOrder({new: Source(corpora / new)}, Replay(Fraction(share), **replay), ledger, LENGTH, seed)


def seen(number: int, num_consumed: int, an_epoch: int = 10**9) -> Entry:
    return Entry(f"source {number}", "", f"{number:016x}", LENGTH, number, an_epoch).with_draws(0, num_consumed)


def windows_of(pool: Pool, first: int, number: int) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in pool(np.arange(first, first + number))), strict=True))


@st.composite
def pasts(draw):
    """A ledger of one to four sources: intervals of up to three epochs, with gaps."""
    entries = []
    for number in range(draw(st.integers(1, 4))):
        an_epoch = draw(st.integers(1, 60))
        entry = Entry(f"source {number}", "", f"{number:016x}", LENGTH, draw(st.integers(0, 2**62)), an_epoch)
        for _ in range(draw(st.integers(1, 3))):
            first = draw(st.integers(0, 3 * an_epoch))
            already = {(e, p) for e, a, b in entry.intervals() for p in range(a, b)}
            length = draw(st.integers(1, an_epoch))
            if not already & {divmod(d, an_epoch) for d in range(first, first + length)}:
                entry = entry.with_draws(first, length)
        entries.append((number, entry))
    return entries


def everything(past) -> list[tuple[int, int, int]]:
    return [(n, e, p) for n, entry in past for e, start, stop in entry.intervals() for p in range(start, stop)]


@given(pasts(), st.sampled_from(["shuffled", "original"]), st.none() | st.integers(1, 80), st.integers(0, 2**62))
@settings(max_examples=150, deadline=None)
def test_a_pool_gives_every_window_it_holds_once_a_round_and_no_other(past, order, capacity, seed):
    settings_of_replay = Replay(Fraction(1, 2), order=order, capacity=capacity or "unlimited")
    pool = Pool(past, settings_of_replay, seed)
    consumed = everything(past)
    assert len(pool) == min(len(consumed), capacity or len(consumed))
    rounds = [windows_of(pool, number * len(pool), len(pool)) for number in range(3)]
    assert set(rounds[0]) <= set(consumed)
    for one_round in rounds:
        assert sorted(one_round) == sorted(rounds[0])
        assert len(set(one_round)) == len(pool)
    if not capacity:
        assert sorted(rounds[0]) == sorted(consumed)


def test_the_original_order_is_that_of_consumption_with_sources_in_proportion():
    past = [(0, seen(0, 30)), (1, seen(1, 10, an_epoch=4))]
    first_round = windows_of(Pool(past, Replay(Fraction(1, 2), order="original"), 1), 0, 40)
    assert [w for w in first_round if w[0] == 0] == [(0, 0, p) for p in range(30)]
    assert [w for w in first_round if w[0] == 1] == [(1, *divmod(p, 4)) for p in range(10)]
    for number in range(1, 41):
        assert abs(sum(w[0] == 1 for w in first_round[:number]) - number / 4) < 1


def test_the_original_order_of_large_pasts_takes_no_longer_to_make_ready():
    past = [(0, seen(0, 10**8 + 7)), (1, seen(1, 12_345))]
    pool = Pool(past, Replay(Fraction(1, 2), order="original"), 1)
    assert Counter(w[0] for w in windows_of(pool, 0, 100_000))[1] == pytest.approx(100_000 * 12_345 / 10**8, abs=30)


def test_each_window_is_in_a_reservoir_with_equal_chance():
    """Chi-square over 2,000 reservoirs of 30 of 100 windows of three sources: p = 1e-6 is at 176 (99 degrees)."""
    hits = np.zeros(100)
    for seed in range(2000):
        entries = [replace(seen(n, size, an_epoch=17), seed=1000 * seed + n) for n, size in enumerate((40, 25, 35))]
        hits[reservoir(entries, 30)] += 1
    expected = 2000 * 30 / 100
    # Each window is in or out: the variance is that of a hypergeometric draw.
    assert ((hits - expected) ** 2 / (expected * (1 - 30 / 99))).sum() < 176


def test_sources_with_the_same_seed_have_reservoirs_of_their_own():
    """Runs of one seed give their first sources equal seeds; what is kept of one must say nothing about the other."""
    kept = reservoir([replace(seen(number, 1000), seed=5) for number in (0, 1)], 200)
    of_first, of_second = kept[kept < 1000], kept[kept >= 1000] - 1000
    assert len(of_first) + len(of_second) == 200
    assert len(np.intersect1d(of_first, of_second)) < 30  # 10 expected, 100 if they were the same


def test_any_two_windows_are_in_a_reservoir_together_as_often_as_chance_has_it():
    together = np.zeros((20, 20))
    for seed in range(4000):
        kept = reservoir([replace(seen(0, 20), seed=seed)], 6)
        together[np.ix_(kept, kept)] += 1
    pairs = together[np.triu_indices(20, 1)]
    expected = 4000 * 6 * 5 / (20 * 19)
    assert abs(pairs - expected).max() < 5 * np.sqrt(expected)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 2**62))
@settings(max_examples=80, deadline=None)
def test_what_a_reservoir_has_pushed_out_does_not_come_back(num_windows, capacity, seed):
    entry = replace(seen(0, 0, an_epoch=90), seed=seed)
    before, ever = set(), set()
    for number in range(1, num_windows + 1):
        now = set(reservoir([entry.with_draws(0, number)], capacity).tolist())
        assert len(now) == min(number, capacity)
        assert not now & (ever - before)
        assert len(now - before) <= 1 and now - before <= {number - 1}
        before, ever = now, ever | now


def test_a_reservoir_is_the_same_however_it_is_computed(monkeypatch):
    entries = [seen(0, 700, an_epoch=300), seen(1, 55)]
    whole = reservoir(entries, 50)
    monkeypatch.setattr("cpt.data.replay._WINDOWS_AT_ONCE", 64)
    assert np.array_equal(reservoir(entries, 50), whole)


def test_replay_from_named_sources_draws_from_those_alone(corpora):
    ledger = Ledger((entry_of(corpora, "old", 20), entry_of(corpora, "other", 9)))
    order = order_with(corpora, ledger, from_=("other",))
    assert order.source_names == ["new", "replay/other"]
    assert order.num_replayable == 9


@pytest.mark.parametrize(("tokens", "num_windows"), [(None, 26), (100, 12)])
def test_a_declared_corpus_is_replayed_as_if_it_had_been_consumed(corpora, tokens, num_windows):
    order = order_with(corpora, Ledger(), declared={"pile": Declared(corpora / "other", tokens)})
    assert order.source_names == ["new", "replay/pile"]
    assert order.num_replayable == num_windows
    assert sorted(drawn_of(order, "replay/pile", 2 * num_windows)) == [LENGTH * n for n in range(num_windows)]
    assert [entry.source for entry in order.ledger_after(50).entries] == ["new"]  # this lineage did not consume it


def test_ancestors_and_declared_corpora_are_replayed_together(corpora):
    ledger = Ledger((entry_of(corpora, "old", 20),))
    order = order_with(corpora, ledger, declared={"pile": Declared(corpora / "other")})
    assert Counter(name for name, _ in drawn(order, 92)) == {"new": 46, "replay/old": 20, "replay/pile": 26}


def test_all_seen_draws_from_the_stage_itself_but_never_before_it_was_consumed(corpora):
    ledger = Ledger((entry_of(corpora, "old", 20),))
    order = order_with(corpora, ledger, share="1/3", scope="all_seen")
    assert order.source_names == ["new", "replay/old", "replay/new"]
    consumed, replayed_new = set(), 0
    for name, first in drawn(order, 500):
        if name == "new":
            consumed.add(first)
        if name == "replay/new":
            assert first in consumed
            replayed_new += 1
    # By the end 333 of 353 windows seen are the stage's own (over several epochs of it).
    assert replayed_new > 100


def test_all_seen_draws_evenly_from_all_that_was_seen_when_its_pool_was_drawn_up(corpora):
    ledger = Ledger((entry_of(corpora, "old", 48),))
    last = [drawn(order_with(corpora, ledger, scope="all_seen", seed=seed), 400)[300:] for seed in range(30)]
    shares = Counter(name for draws in last for name, _ in draws)
    of_old = shares["replay/old"] / (shares["replay/old"] + shares["replay/new"])
    assert 48 / (48 + 200) < of_old < 48 / (48 + 110)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 900))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize(
    "replay",
    [
        {"scope": "all_seen"},
        {"scope": "all_seen", "capacity": 11},
        {"order": "original"},
        {"capacity": 7},
        {"ramp": Ramp(Fraction(0), 320 * LENGTH)},
        {"scope": "all_seen", "ramp": Ramp(Fraction(3, 4), 40 * LENGTH)},
    ],
    ids=str,
)
def test_an_order_with_any_kind_of_replay_is_the_same_read_in_any_portions_from_anywhere(
    corpora, replay, portions, first_slot
):
    ledger = Ledger((entry_of(corpora, "old", 20), entry_of(corpora, "other", 13)))
    together = drawn(order_with(corpora, ledger, "1/4", **replay), sum(portions), first_slot)
    apart, order = [], order_with(corpora, ledger, "1/4", **replay)
    for portion in portions:
        apart += drawn(order, portion, first_slot + len(apart))
    assert apart == together
    assert drawn(order, len(together), first_slot) == together  # going back, too


def test_a_capacity_keeps_replay_to_so_many_windows_and_a_grandchild_keeps_to_the_same_reservoir(corpora):
    ledger = Ledger((entry_of(corpora, "old", 48),))
    child = order_with(corpora, ledger, capacity=10, seed=1)
    kept = set(drawn_of(child, "replay/old", 200))
    assert len(kept) == 10
    assert kept <= set(drawn_of(order_with(corpora, ledger, seed=5), "replay/old", 200))
    grandchild = order_with(corpora, child.ledger_after(60), capacity=10, new="other", seed=2)
    replayed = {pair for pair in drawn(grandchild, 200) if pair[0] != "other"}
    assert len(replayed) == 10
    assert {first for name, first in replayed if name == "replay/old"} <= kept


def test_a_ramp_alone_asks_for_replay_at_first_and_none_later(corpora):
    ledger = Ledger((entry_of(corpora, "old", 48),))
    order = order_with(corpora, ledger, "0", ramp=Ramp(Fraction(1, 2), 512 * LENGTH))
    names = [name for name, _ in drawn(order, 800)]
    assert names[:512].count("replay/old") == 128
    assert "replay/old" not in names[512:]


def test_what_is_held_out_is_never_drawn_in_any_epoch(corpora):
    source = Source(corpora / "old", hold_out=Fraction(1, 5))
    order = StageOrder({"old": source}, None, Ledger(), LENGTH, 1)
    firsts = drawn_of(order, "old", 500)
    assert max(firsts) + LENGTH + 1 <= 320  # 401 tokens: 320 are trained on, whole windows of what is left are held out
    assert min(firsts) == 0


def test_shares_by_name_count_for_new_sources_only_in_all_kinds_of_replay(corpora):
    ledger = Ledger((entry_of(corpora, "other", 20),))
    plain = order_of(corpora, {"old": 1, "new": 3}, ledger, "1/5")
    sources = {"old": Source(corpora / "old", Fraction(1)), "new": Source(corpora / "new", Fraction(3))}
    for replay in ({"capacity": 5}, {"order": "original"}, {"scope": "all_seen"}):
        other = StageOrder(sources, Replay(Fraction(1, 5), **replay), ledger, LENGTH, 1)
        new = [pair for pair in drawn(other, 200) if not pair[0].startswith("replay/")]
        assert new == [pair for pair in drawn(plain, 200) if not pair[0].startswith("replay/")]
        assert other.ledger_after(123) == plain.ledger_after(123)


def test_what_a_source_holds_out_is_not_replayed_though_the_corpus_is_declared_whole(corpora):
    sources = {"old": Source(corpora / "old", hold_out=Fraction(1, 5))}
    replay = Replay(Fraction(1, 2), declared={"pile": Declared(corpora / "old")})
    firsts = drawn_of(StageOrder(sources, replay, Ledger(), LENGTH, 1), "replay/pile", 400)
    assert max(firsts) + LENGTH < 320
    child = order_with(
        corpora, StageOrder(sources, None, Ledger(), LENGTH, 1).ledger_after(5), declared=replay.declared
    )
    assert child.source_names == ["new", "replay/old"]


def test_a_corpus_that_was_moved_is_found_where_it_is_declared_to_lie_now(corpora, tmp_path):
    entry = replace(entry_of(corpora, "old", 20), corpus=str(tmp_path / "gone"))
    with pytest.raises(Fault, match=r"if it was moved, say where it lies now: replay.declared: {old: {corpus: PATH}}"):
        order_with(corpora, Ledger((entry,)))
    order = order_with(corpora, Ledger((entry,)), declared={"old": Declared(corpora / "old")})
    assert order.source_names == ["new", "replay/old"]
    assert order.num_replayable == 20  # what was consumed, not all that is declared


def test_the_ledger_keeps_places_that_hold_in_any_folder(corpora, monkeypatch):
    monkeypatch.chdir(corpora)
    order = StageOrder({"old": Source(Path("old"))}, None, Ledger(), LENGTH, 1)
    assert order.ledger_after(3).entries[0].corpus == str(corpora / "old")
