"""The table of what a stage draws from where, in tokens and epochs of the whole lineage."""

from __future__ import annotations

from fractions import Fraction

from cpt_harness.orders import LENGTH, entry_of, make_corpora

from cpt.data.order import StageOrder
from cpt.data.replay import Replay
from cpt.data.share_table import share_table
from cpt.data.streams import Source
from cpt.lineage.ledger import Ledger


def test_tokens_shares_and_epochs_of_a_stage_worked_by_hand(tmp_path):
    corpora = make_corpora(tmp_path)
    ledger = Ledger((entry_of(corpora, "old", 49), entry_of(corpora, "other", 13)))
    sources = {"old": Source(corpora / "old"), "new": Source(corpora / "new", Fraction(3))}
    order = StageOrder(sources, Replay(Fraction(1, 5)), ledger, LENGTH, 1)
    # 200 slots: 40 replay of 62 windows, 40 old of 49 an epoch, 120 new of 96 an epoch.
    assert share_table(order, 200) == [
        "source  tokens  share  epochs  before  corpus",
        f"old        320  20.0%    1.82    1.00  {corpora}/old",
        f"new        960  60.0%    1.25    0.00  {corpora}/new",
        "replay     320  20.0%    0.65          496 tokens of old, other",
    ]
    assert len(share_table(StageOrder(sources, None, ledger, LENGTH, 1), 10)) == 3


def test_what_another_run_has_drawn_in_the_stage_was_read_before(tmp_path):
    corpora = make_corpora(tmp_path)
    order = StageOrder({"old": Source(corpora / "old")}, None, Ledger(), LENGTH, 1, num_slots_before=49)
    assert share_table(order, 10)[1] == f"old         80  100.0%    1.20    1.00  {corpora}/old"
