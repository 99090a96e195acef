"""Inspecting a corpus shows its counts, lengths and sample texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cpt.data.prepare import inspect as inspecting
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.inspect import inspect_corpus
from cpt.data.shards import ShardWriter


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A token for each lower-case letter and the space, an unknown one for all else, and an end of document."""
    folder = tmp_path_factory.mktemp("letters")
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    made = tokenizers.Tokenizer(models.BPE({**letters, "<unk>": 27}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def build(folder: Path, tokenizer: Path, texts: list[str], **options) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus([folder / "a.jsonl"], tokenizer, folder / "prose", **options)
    return folder / "prose"


def test_counts_lengths_and_rates_are_those_of_the_text(tmp_path, tokenizer):
    texts = ["abc", "a" * 9, "x?z!" * 5, "b" * 40]
    inspection = inspect_corpus(build(tmp_path, tokenizer, texts, shard_tokens=30))
    assert (inspection.name, inspection.num_documents, inspection.num_shards) == ("prose", 4, 3)
    assert (inspection.num_tokens, inspection.num_bytes) == (3 + 9 + 20 + 40 + 4, 72)
    assert (inspection.dtype, inspection.vocabulary_size) == ("uint16", 29)
    assert inspection.length_percentiles[0] == 4
    assert inspection.length_percentiles[50] in (10, 21)
    assert inspection.length_percentiles[100] == 41
    assert inspection.unknown_rate == pytest.approx(10 / 76)
    assert inspection.end_rate == pytest.approx(4 / 76)
    assert inspection.bytes_per_token == pytest.approx(72 / 76)


def test_samples_are_beginnings_of_documents_with_their_ends_marked(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(inspecting, "SAMPLE_TEXT_TOKENS", 8)
    path = build(tmp_path, tokenizer, ["short one", "abc", "mid", "the quick brown fox", "end"], shard_tokens=20)
    first, middle, last = inspect_corpus(path).samples
    assert (first.document, first.text, first.is_whole, first.has_end) == (0, "short on", False, True)
    assert (middle.document, middle.text, middle.is_whole, middle.has_end) == (2, "mid", True, True)
    assert (last.document, last.text, last.num_tokens) == (4, "end", 4)


def test_a_corpus_without_ends_shows_none(tmp_path, tokenizer):
    inspection = inspect_corpus(build(tmp_path, tokenizer, ["abc"], append_eos=False))
    assert inspection.end_rate is None
    assert [(sample.text, sample.has_end) for sample in inspection.samples] == [("abc", False)]


def test_a_bare_prefix_shows_counts_only(tmp_path):
    with ShardWriter(tmp_path / "web", 70_000) as writer:
        writer.add_document(np.arange(5))
    inspection = inspect_corpus(tmp_path / "web")
    assert (inspection.num_tokens, inspection.dtype, inspection.samples) == (5, "int32", ())
    unknown = (inspection.num_bytes, inspection.bytes_per_token, inspection.unknown_rate, inspection.end_rate)
    assert unknown == (None,) * 4


def test_a_shard_without_documents_can_be_inspected(tmp_path):
    with ShardWriter(tmp_path / "none", 500):
        pass
    inspection = inspect_corpus(tmp_path / "none")
    assert (inspection.num_documents, inspection.num_tokens, inspection.length_percentiles[50]) == (0, 0, 0)


def test_rates_of_a_large_corpus_come_from_a_part_of_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(inspecting, "SAMPLED_TOKENS", 100)
    inspection = inspect_corpus(build(tmp_path, tokenizer, ["ab?"] * 200, shard_tokens=100))
    assert inspection.num_tokens == 800
    assert 50 <= inspection.sampled_tokens <= 100
    assert inspection.unknown_rate == pytest.approx(0.25)
