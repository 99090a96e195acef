"""What cannot work about a stage's sources is told before anything is trained on, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpt_harness.numbered import numbered_corpus
from cpt_harness.orders import LENGTH, drawn, entry_of, make_corpora, order_of

from cpt.config import Fault, read_settings
from cpt.data.order import Replay, Source, StageOrder
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
        "replay.share is above 0, but the lineage has consumed nothing yet; name a parent, or leave replay out"
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
        (Replay, {"accounting": "replaces"}, "accounting = 'replaces' is not known; did you mean replaces_new?"),
    ],
)
def test_settings_that_cannot_be_met_are_faults(kind, given, told):
    with pytest.raises(Fault) as caught:
        read_settings(kind, given)
    assert str(caught.value) == told
