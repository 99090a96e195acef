"""What cannot work about a stage's sources is told before anything is trained on, all at once."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from cpt_harness.numbered import numbered_corpus
from cpt_harness.orders import LENGTH, drawn, entry_of, make_corpora, order_of

from cpt.config import Fault, read_settings
from cpt.data.order import StageOrder
from cpt.data.replay import Declared, Replay
from cpt.data.streams import Source
from cpt.lineage.ledger import Entry, Ledger


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def faults_of(*arguments, **named) -> list[str]:
    with pytest.raises(Fault) as caught:
        order_of(*arguments, **named)
    return list(caught.value.lines)


def test_a_missing_corpus_is_a_fault(corpora):
    assert faults_of(corpora, {"nowhere": 1})[0].startswith(f"there is no corpus at {corpora}/nowhere: ")


def test_a_corpus_shorter_than_an_epoch_is_a_fault(corpora, tmp_path):
    numbered_corpus(tmp_path / "short", 2 * LENGTH - 1)
    assert faults_of(tmp_path, {"short": 1}) == [
        f"{tmp_path}/short holds 15 tokens, less than two windows of 9; lower sequence_length or add text"
    ]
    numbered_corpus(tmp_path / "enough", 2 * LENGTH)
    assert len(set(drawn(order_of(tmp_path, {"enough": 1}), 20))) > 1


def test_replay_without_a_past_is_a_fault(corpora):
    assert faults_of(corpora, {"new": 1}, replay="1/4") == [
        "replay.share is above 0, but the lineage has consumed nothing yet; name a parent, declare in "
        "replay.declared what the model saw elsewhere, or leave replay out"
    ]


def test_replay_of_a_corpus_that_has_changed_is_a_fault(corpora):
    entry = Entry(**{**vars(entry_of(corpora, "old", 5)), "fingerprint": "0" * 16})
    assert faults_of(corpora, {"new": 1}, Ledger((entry,)), "1/4") == [
        f"{corpora}/old has changed since the lineage consumed it as old: replay would draw other text; "
        "put the corpus of that time back, or leave replay out"
    ]


def test_replay_of_a_corpus_that_is_gone_is_a_fault(corpora):
    entry = Entry(**{**vars(entry_of(corpora, "old", 5)), "corpus": str(corpora / "gone")})
    assert faults_of(corpora, {"new": 1}, Ledger((entry,)), "1/4")[0].startswith(
        f"replay of old: there is no corpus at {corpora}/gone"
    )


def test_replay_of_windows_of_another_length_is_a_fault(corpora):
    ledger = Ledger((entry_of(corpora, "old", 5),))
    assert faults_of(corpora, {"new": 1}, ledger, "1/4", length=16) == [
        "the lineage consumed old at sequence_length 8; replay draws those windows and cannot cut them to 16: "
        "set sequence_length back, or leave replay out"
    ]


def test_the_same_corpus_twice_is_a_fault(corpora, tmp_path):
    copy = numbered_corpus(tmp_path / "copy", 401)
    with pytest.raises(Fault) as caught:
        StageOrder({"a": Source(corpora / "old"), "b": Source(copy)}, None, Ledger(), LENGTH, 1)
    assert str(caught.value) == f"{copy} is named twice in this stage; give it one source with the sum of the shares"


def test_shares_that_cannot_be_kept_exactly_are_a_fault(corpora):
    assert "repeat only after" in faults_of(corpora, {"old": "0.123457", "new": "0.876543"})[0]


def test_all_faults_of_a_stage_are_told_at_once(corpora):
    lines = faults_of(corpora, {"nowhere": "0.123457", "gone": "0.876543"}, replay="1/4")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (Source, {"corpus": "x", "share": 0}, "share = 0.0: above 0; leave the source out instead"),
        (Source, {"corpus": "x", "share": -1}, "share = -1.0: above 0; leave the source out instead"),
        (Replay, {"share": 1}, "share = 1.0: at least 0 and below 1"),
        (Replay, {"share": "-5%"}, "share = -0.05: at least 0 and below 1"),
        (Source, {"corpus": "x", "max_epochs": 0}, "max_epochs = 0.0: above 0"),
        (Source, {"corpus": "x", "hold_out": 1}, "hold_out = 1.0: at least 0 and below 1"),
        (Replay, {"capacity": 0}, "capacity = 0: at least 1 window, or unlimited"),
        (Replay, {"capacity": "all"}, "capacity = 'all': expected unlimited, or a whole number, such as 2048 or 300M"),
        (Replay, {"from": "prose"}, "from = 'prose': expected ancestors, or a list"),
        (Replay, {"from": []}, "from names no source; name some, or write ancestors"),
        (
            Replay,
            {"declared": {"old": {"corpus": "x", "tokens": 0}}},
            "declared.old.tokens = 0: at least 1; leave it out if the model saw all of the corpus",
        ),
        (
            Replay,
            {"order": "original", "scope": "all_seen"},
            "order = original: goes with scope: past_only; what is being consumed has no order of its own",
        ),
        (
            Replay,
            {"ramp": {"start": 1, "tokens": 0}},
            "ramp.start = 1.0: at least 0 and below 1\nramp.tokens = 0: at least 1; leave ramp out instead",
        ),
        (Replay, {"accounting": "replaces"}, "accounting = 'replaces' is not known; did you mean replaces_new?"),
    ],
)
def test_settings_that_cannot_be_met_are_faults(kind, given, told):
    with pytest.raises(Fault) as caught:
        read_settings(kind, given)
    assert str(caught.value) == told


def test_a_source_to_replay_that_nobody_consumed_or_declared_is_a_fault(corpora):
    ledger = Ledger((entry_of(corpora, "old", 5),))
    with pytest.raises(Fault) as caught:
        replay_of(corpora, ledger, from_=("odl",), declared={"pile": Declared(corpora / "other")})
    assert str(caught.value) == "replay.from: nothing called odl was consumed or is declared; there is old, pile"


def test_replay_of_nothing_but_what_the_stage_is_about_to_read_is_a_fault(corpora):
    ledger = Ledger((entry_of(corpora, "old", 5),))
    with pytest.raises(Fault) as caught:
        replay_of(corpora, ledger, from_=("new",), scope="all_seen")
    assert str(caught.value) == (
        "replay.from: nothing of it was consumed when the stage begins; name a source of the past too"
    )


@pytest.mark.parametrize(
    ("name", "tokens", "told"),
    [
        ("gone", None, "replay.declared.pile: there is no corpus at "),
        ("other", 216, "replay.declared.pile.tokens = 216: {corpora}/other holds 215; leave it out for all"),
        ("other", LENGTH, f"replay.declared.pile: {LENGTH} tokens are not one window of {LENGTH + 1}"),
    ],
)
def test_a_declared_corpus_that_cannot_be_drawn_from_is_a_fault(corpora, name, tokens, told):
    with pytest.raises(Fault) as caught:
        replay_of(corpora, Ledger(), declared={"pile": Declared(corpora / name, tokens)})
    assert str(caught.value).startswith(told.format(corpora=corpora))


def limited(corpora: Path, num_consumed: int, num_inherited: int, **source) -> StageOrder:
    entry = replace(entry_of(corpora, "old", num_consumed), num_inherited=num_inherited)
    ledger = Ledger((entry,) if num_consumed else ())
    return StageOrder({"old": Source(corpora / "old", **source)}, None, ledger, LENGTH, 1)


def test_max_epochs_counts_what_the_lineage_has_read_and_refuses_one_window_more(corpora):
    order = limited(corpora, 20, 0, max_epochs=Fraction(3, 2))  # 49 windows an epoch, 73 may be read, 20 were
    assert order.faults_over(53) == []
    assert order.faults_over(54) == [
        "sources.old: the stage asks for 54 windows and may draw 53: 20 of its 49 were consumed before, "
        "max_epochs = 1.5; raise max_epochs, lower its share or the stage's tokens, or add text"
    ]


def test_what_an_ancestor_read_is_read_again_only_when_told(corpora):
    assert limited(corpora, 20, 20).faults_over(29) == []
    assert limited(corpora, 20, 20).faults_over(30) == [
        "sources.old: the stage asks for 30 windows and may draw 29: 20 of its 49 were consumed before, ancestors "
        "have read the rest; set max_epochs = 2 to read it again, lower its share or the stage's tokens, or add text"
    ]
    assert (
        limited(corpora, 49, 49)
        .faults_over(1)[0]
        .startswith("sources.old: the stage asks for 1 windows and may draw 0:")
    )
    assert limited(corpora, 20, 20, max_epochs=2).faults_over(49 + 29) == []
    assert limited(corpora, 20, 0).faults_over(1000) == []  # the run itself may go round
    assert limited(corpora, 0, 0).faults_over(1000) == []


def test_another_part_held_out_than_the_lineage_held_out_is_a_fault(corpora):
    with pytest.raises(Fault) as caught:
        limited(corpora, 20, 20, hold_out=Fraction(1, 10))
    assert str(caught.value) == (
        f"sources.old.hold_out = 0.1: the lineage consumed {corpora}/old with another part held out "
        "(49 windows an epoch, now 44); set it back"
    )


def replay_of(corpora: Path, ledger: Ledger, **replay) -> StageOrder:
    sources = {"new": Source(corpora / "new")}
    return StageOrder(sources, Replay(Fraction(1, 4), **replay), ledger, LENGTH, 1)


def test_a_corpus_that_the_lineage_read_at_another_length_is_read_again_only_when_told_and_counted(corpora):
    ledger = Ledger((replace(entry_of(corpora, "old", 40), num_inherited=40),))  # 40 of 49 windows of 8 tokens

    def order(**source) -> StageOrder:
        return StageOrder({"old": Source(corpora / "old", **source)}, None, ledger, 2 * LENGTH, 1)

    assert order().faults_over(5) == [
        "sources.old: the lineage has read 0.82 epochs of it in windows of another length, and which of its text is "
        "new cannot be told from these; set max_epochs = 2 to read it all the same, or sequence_length back"
    ]
    told = order(max_epochs=1).faults_over(5)  # 24 windows an epoch are left 0.18 of
    assert "the stage asks for 5 windows and may draw 4" in told[0]
    assert order(max_epochs=1).faults_over(4) == order(max_epochs=2).faults_over(24) == []


def test_what_was_held_out_at_another_length_stays_held_out(corpora):
    entry = limited(corpora, 0, 0, hold_out=Fraction(1, 5)).ledger_after(10).entries[0]
    ledger = Ledger((entry,))
    with pytest.raises(Fault, match="the lineage held out what lies behind token .* set hold_out = 0.1"):
        StageOrder({"old": Source(corpora / "old", max_epochs=9)}, None, ledger, 2 * LENGTH, 1)
    StageOrder({"old": Source(corpora / "old", max_epochs=9, hold_out=Fraction(1, 5))}, None, ledger, 2 * LENGTH, 1)


def test_a_declared_corpus_packed_for_another_length_is_a_fault(corpora, tmp_path):
    path = numbered_corpus(tmp_path / "packed", 401, packed_length=2 * LENGTH)
    with pytest.raises(Fault, match=r"replay.declared.pile.corpus = .* was packed for sequence_length 16, not 8"):
        replay_of(corpora, Ledger(), declared={"pile": Declared(path)})


def test_shares_that_cannot_be_kept_are_told_by_name_with_their_sum(corpora):
    (told,) = faults_of(corpora, {"old": "0.123457", "new": "0.876542"})
    assert told == (
        "sources: the shares old 0.123457, new 0.876542 (together 0.999999) repeat only after 999,999 windows, and can "
        "be kept exactly up to 65,536; write them with fewer digits, or let them sum to 1"
    )


@pytest.mark.parametrize(
    "shares", [{"old": "0.6061", "new": "0.3939"}, {"old": "12.34", "new": "45.67", "other": "20"}]
)
def test_shares_of_four_digits_go_with_any_share_of_replay(corpora, shares):
    ledger = Ledger((entry_of(corpora, "other", 20),))
    order = order_of(corpora, shares, ledger, "0.1")
    counts = order.mixture.counts(100_000)
    whole = sum(map(Fraction, shares.values()))
    assert counts[-1] == 10_000
    for count, share in zip(counts, shares.values(), strict=False):
        assert abs(count - 90_000 * Fraction(share) / whole) < 1
