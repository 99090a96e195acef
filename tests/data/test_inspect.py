"""Inspecting a corpus shows its counts, lengths and sample texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare import inspect as inspecting
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.inspect import inspect_corpus
from cpt.data.prepare.pack import pack_corpus
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


def byte_fallback(folder: Path) -> Path:
    """Tokens for a and b, a byte-fallback piece for every byte, and an end of document."""
    pieces = {"a": 0, "b": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    made = tokenizers.Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_byte_fallback_is_told_over_all_and_of_each_sample(tmp_path):
    inspection = inspect_corpus(build(tmp_path, byte_fallback(tmp_path / "t"), ["ab", "aé", "漢"]))
    assert inspection.byte_rate == pytest.approx(5 / 11)
    assert [sample.byte_rate for sample in inspection.samples] == pytest.approx([0, 2 / 4, 3 / 4])
    assert [sample.text for sample in inspection.samples] == ["ab", "aé", "漢"]


def test_of_byte_level_tokens_those_that_are_no_character_are_told(tmp_path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    inspection = inspect_corpus(build(tmp_path, tmp_path / "tokenizer.json", ["a é", "b c"], append_eos=False))
    assert inspection.byte_rate == pytest.approx(2 / 7)
    assert inspection.unknown_rate is None


def test_a_tokenizer_without_tokens_for_bytes_has_no_rate_of_them(tmp_path, tokenizer):
    inspection = inspect_corpus(build(tmp_path, tokenizer, ["abc"]))
    assert inspection.byte_rate is None
    assert inspection.samples[0].byte_rate is None
    assert inspection.samples[0].unknown_rate == 0


def test_raw_files_and_bare_prefixes_show_texts_with_a_tokenizer(tmp_path, tokenizer):
    path = build(tmp_path, tokenizer, ["abc", "the fox?"])
    tokens = np.fromfile(path / "shard-00000.bin", np.uint16)
    tokens.tofile(tmp_path / "raw.npy")
    end = Corpus.open(path).end_of_document
    bare = inspect_corpus(path / "shard-00000", tokenizer=tokenizer)
    raw = inspect_corpus(f"{tmp_path}/raw.npy:uint16:end={end}", tokenizer=tokenizer)
    assert [sample.text for sample in raw.samples] == ["abc", "the fox<unk>"]
    assert [sample.text for sample in bare.samples] == ["abc</s>", "the fox<unk></s>"]
    assert (raw.num_documents, raw.end_rate) == (2, pytest.approx(2 / 13))
    assert bare.unknown_rate == raw.unknown_rate == pytest.approx(1 / 13)


def test_ids_that_are_not_the_tokenizers_are_told(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.array([3, 499]))
    message = r"web has token id 499, outside the vocabulary of 29 of .*tokenizer\.json; name the tokenizer that made"
    with pytest.raises(Fault, match=message):
        inspect_corpus(tmp_path / "web", tokenizer=tokenizer)


def write_prefix(prefix: Path) -> Path:
    with ShardWriter(prefix, 500) as writer:
        for length in (1, 3, 2):
            writer.add_document(np.arange(length))
    return prefix


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("position", [34, 34 + 12, 34 + 36 + 8], ids=["lengths", "offsets", "documents"])
@pytest.mark.parametrize("is_split", [False, True])
def test_a_damaged_index_is_told(tmp_path, position, is_split):
    prefix = write_prefix(tmp_path / "web")
    if is_split:
        (tmp_path / "web.bin").rename(tmp_path / "web-00000-of-00001.bin")
    flip_bit(tmp_path / "web.idx", position)
    with pytest.raises(Fault, match="web.idx: its lengths, offsets and documents contradict each other") as caught:
        inspect_corpus(prefix)
    assert caught.value.lines[1] == f"cpt data verify {prefix} tells more; copy the files or write them again"


def test_a_damaged_index_of_a_corpus_with_a_manifest_is_told(tmp_path, tokenizer):
    path = build(tmp_path, tokenizer, ["abc", "defgh"])
    flip_bit(path / "shard-00000.idx", -16)
    with pytest.raises(Fault, match="shard-00000.idx: its lengths, offsets and documents contradict each other"):
        inspect_corpus(path)


def test_damaged_datatrove_files_are_told(tmp_path):
    np.arange(6, dtype=np.uint16).tofile(tmp_path / "a.ds")
    np.array([9, 2, 6], dtype=np.uint64).tofile(tmp_path / "a.ds.index")
    (tmp_path / "a.ds.metadata").write_text("gpt2|2\n6\n")
    with pytest.raises(Fault, match=r"a\.ds: the ends of its documents are not in order or lie outside"):
        inspect_corpus(tmp_path / "a.ds")
    (tmp_path / "a.ds.metadata").write_bytes(b"\xff\n6\n")
    with pytest.raises(Fault, match=r"a\.ds\.metadata is not as datatrove writes it"):
        inspect_corpus(tmp_path / "a.ds")


def test_of_a_folder_of_corpora_one_is_to_be_named(tmp_path, tokenizer):
    build(tmp_path, tokenizer, ["abc"])
    for number in range(12):
        (tmp_path / "parts" / f"{number:02d}").mkdir(parents=True)
        (tmp_path / "parts" / f"{number:02d}" / "corpus.json").write_text("{}")
    message = r"parts is no corpus but holds some: 00, 01, .*, 09 and 2 more; name one of them, such as .*parts/00"
    with pytest.raises(Fault, match=message):
        inspect_corpus(tmp_path / "parts")
    write_prefix(tmp_path / "parts")
    assert inspect_corpus(tmp_path / "parts").num_documents == 3


def test_padding_of_a_packed_corpus_is_told_and_is_no_text(tmp_path, tokenizer):
    pack_corpus(build(tmp_path, tokenizer, ["abc", "defgh"]), 8, tmp_path / "packed")
    inspection = inspect_corpus(tmp_path / "packed")
    assert (inspection.packed_length, inspection.num_tokens, inspection.num_padding) == (8, 17, 7)
    assert inspection.bytes_per_token == pytest.approx(8 / 10)
    assert inspection.length_percentiles == {0: 4, 10: 4, 50: 4, 90: 6, 99: 6, 100: 6}
    assert {sample.text for sample in inspection.samples} == {"abc", "defgh"}


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
