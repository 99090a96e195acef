"""Slots that nothing is learned from: consumed, never drawn as new again, never replayed; the other slots stay."""

from __future__ import annotations

from fractions import Fraction

import pytest
from cpt_harness.orders import LENGTH, NOTHING, drawn, make_corpora

from cpt.data.order import StageOrder
from cpt.data.replay import Replay
from cpt.data.streams import Source
from cpt.lineage.ledger import Ledger, Skipped

SKIPPED = (Skipped("one", 16, 8, 3, "loss nan"), Skipped("one", 40, 4, 6, "a spike"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def order_with(corpora, skipped=SKIPPED, ledger: Ledger = NOTHING, before: int = 0, replay=None) -> StageOrder:
    sources = {name: Source(corpora / name, Fraction(share)) for name, share in {"old": 1, "new": 2}.items()}
    return StageOrder(sources, replay, ledger, LENGTH, 1, before, (), skipped)


def test_no_slot_moves(corpora):
    assert drawn(order_with(corpora), 90) == drawn(order_with(corpora, ()), 90)


def test_a_slot_is_skipped_if_the_ledger_says_so_wherever_the_run_began_in_the_stage(corpora):
    for before in (0, 10):
        order = order_with(corpora, before=before)
        of_slots = [order.skipped_in(slot - before, 1) for slot in range(10, 60)]
        assert [found is not None for found in of_slots] == [16 <= s < 24 or 40 <= s < 44 for s in range(10, 60)]
        assert order.skipped_in(12 - before, 4) is None and order.skipped_in(12 - before, 5) == SKIPPED[0]


def test_the_ledger_holds_them_as_consumed_and_not_as_trained_on(corpora):
    with_them, without = order_with(corpora).ledger_after(60), order_with(corpora, ()).ledger_after(60)
    assert [entry.num_consumed for entry in with_them.entries] == [entry.num_consumed for entry in without.entries]
    assert sum(entry.num_skipped for entry in with_them.entries) == 12
    nothing_left = StageOrder(
        {"other": Source(corpora / "other")}, Replay(Fraction(1, 2)), with_them, LENGTH, 1
    )  # fmt: skip
    replayed = {pair for pair in drawn(nothing_left, 400) if pair[0] != "other"}
    trained = [pair for slot, pair in enumerate(drawn(order_with(corpora), 60)) if not in_skipped(slot)]
    assert {(f"replay/{name}", first) for name, first in trained} == replayed


def in_skipped(slot: int) -> bool:
    return any(one.window <= slot < one.stop for one in SKIPPED)


@pytest.mark.parametrize("num_slots", [16, 20, 24, 41, 60])
def test_of_slots_to_come_the_ledger_says_nothing_yet(corpora, num_slots):
    ledger = order_with(corpora).ledger_after(num_slots)
    assert sum(e.num_skipped for e in ledger.entries) == sum(in_skipped(slot) for slot in range(num_slots))


def test_replay_of_the_stages_own_windows_leaves_them_out(corpora):
    replay = Replay(Fraction(1, 2), scope="all_seen")
    seen = order_with(corpora, (), ledger=order_with(corpora, ()).ledger_after(3))
    order = order_with(corpora, ledger=seen.ledger_after(0), replay=replay)
    slots = drawn(order, 600)
    skipped = {pair for slot, pair in enumerate(slots) if in_skipped(slot) and not pair[0].startswith("replay/")}
    assert skipped and not any((name.removeprefix("replay/"), first) in skipped for name, first in slots[64:]
                               if name.startswith("replay/"))  # fmt: skip
