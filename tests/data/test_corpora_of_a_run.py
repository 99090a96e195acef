"""Corpora that do not fit the model or one another are told before anything is built."""

from __future__ import annotations

import pytest
import tokenizers
from cpt_harness.numbered import VOCABULARY, numbered_corpus

from cpt.config import Fault
from cpt.data.check import open_corpora
from cpt.data.shards import ShardWriter


def test_corpora_that_fit_are_opened_in_order(tmp_path):
    paths = {"a": numbered_corpus(tmp_path / "a", 50), "b": numbered_corpus(tmp_path / "b", 60)}
    assert [corpus.num_tokens for corpus in open_corpora(paths, VOCABULARY)] == [50, 60]


def test_ids_beyond_the_models_vocabulary_are_a_fault(tmp_path):
    path = numbered_corpus(tmp_path / "a", 50)
    with pytest.raises(Fault) as caught:
        open_corpora({"stages.0.sources.a": path}, VOCABULARY - 1)
    assert str(caught.value) == (
        f"stages.0.sources.a: {path} has token ids up to {VOCABULARY - 1}, model.vocabulary is {VOCABULARY - 1}; "
        f"set it to {VOCABULARY} or more, or build the corpus with the model's tokenizer"
    )


def test_two_tokenizers_are_a_fault(tmp_path):
    one = numbered_corpus(tmp_path / "a", 50)
    other = numbered_corpus(tmp_path / "b", 50, tokenizer_hash="f" * 16)
    with pytest.raises(Fault) as caught:
        open_corpora({"a": one, "b": other}, VOCABULARY)
    assert str(caught.value) == f"b: {other} was built with another tokenizer than {one}; build it with that one"


def test_a_corpus_without_a_manifest_says_nothing_of_its_tokenizer(tmp_path):
    with ShardWriter(tmp_path / "bare", 100) as writer:
        writer.add_document(range(50))
    paths = {"bare": tmp_path / "bare", "a": numbered_corpus(tmp_path / "a", 50)}
    assert len(open_corpora(paths, VOCABULARY)) == 2


def test_all_faults_of_all_corpora_are_told_at_once(tmp_path):
    paths = {
        "gone": tmp_path / "gone",
        "a": numbered_corpus(tmp_path / "a", 50),
        "b": numbered_corpus(tmp_path / "b", 50, tokenizer_hash="f" * 16),
        "empty": tmp_path,
    }
    with pytest.raises(Fault) as caught:
        open_corpora(paths, 5)
    assert [line.split(":")[0] for line in caught.value.lines] == ["gone", "a", "b", "b", "empty"]


def test_another_tokenizer_than_the_models_own_is_a_fault(tmp_path):
    corpus = numbered_corpus(tmp_path / "a", 50)
    own = tmp_path / "own"
    own.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<unk>": 0, "a": 1, "</s>": 2}, merges=[]))
    tokenizer.save(str(own / "tokenizer.json"))
    with pytest.raises(Fault, match=r"a: .* was built with another tokenizer than .*own; build it with that one"):
        open_corpora({"a": corpus}, VOCABULARY, own)
