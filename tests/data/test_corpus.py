"""A corpus is one stream of tokens, cut into windows, whatever its shards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.data.corpus import Corpus, Manifest, ShardEntry
from cpt.data.shards import Shard, ShardWriter


def make_corpus(folder: Path, shard_sizes: list[int], **changes) -> np.ndarray:
    """A corpus of random tokens with these numbers of tokens in its shards; the whole stream."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = np.random.default_rng(0).integers(0, 500, sum(shard_sizes))
    entries, start = [], 0
    for number, size in enumerate(shard_sizes):
        with ShardWriter(folder / f"shard-{number:05d}", 500) as writer:
            for document in np.array_split(stream[start : start + size], 2):
                writer.add_document(document)
        start += size
        entries.append(
            ShardEntry(
                name=f"shard-{number:05d}",
                num_tokens=size,
                num_documents=2,
                bin_bytes=2 * size,
                idx_bytes=34 + 20 * 2 + 8,
                bin_xxh64=writer.bin_checksum,
                idx_xxh64=writer.idx_checksum,
            )
        )
    manifest = Manifest(
        tokenizer_hash="0123456789abcdef",
        vocabulary_size=500,
        end_of_document=2,
        begin_of_document=None,
        num_tokens=sum(shard_sizes),
        num_documents=2 * len(shard_sizes),
        num_bytes=4 * sum(shard_sizes),
        inputs=("prose.jsonl",),
        shards=tuple(entries),
    )
    dataclasses.replace(manifest, **changes).write(folder)
    return stream


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_corpus_tells_what_its_manifest_says(tmp_path):
    make_corpus(tmp_path / "prose", [11, 7])
    (tmp_path / "prose" / "tokenizer").mkdir()
    corpus = Corpus.open(tmp_path / "prose")
    assert (corpus.name, corpus.num_tokens, corpus.num_documents, corpus.num_bytes) == ("prose", 18, 4, 72)
    assert (corpus.vocabulary_size, corpus.end_of_document, corpus.num_shards) == (500, 2, 2)
    assert corpus.tokenizer == tmp_path / "prose" / "tokenizer"
    assert corpus.tokenizer_hash == "0123456789abcdef"
    assert corpus.manifest == Manifest.read(tmp_path / "prose")


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_megatron_prefix_is_a_corpus_without_a_manifest(tmp_path, ending):
    with ShardWriter(tmp_path / "web_text_document", 500) as writer:
        writer.add_document(np.arange(30))
    corpus = Corpus.open(f"{tmp_path}/web_text_document{ending}")
    assert (corpus.name, corpus.num_tokens, corpus.num_documents) == ("web_text_document", 30, 1)
    unknown = (
        corpus.num_bytes,
        corpus.vocabulary_size,
        corpus.tokenizer,
        corpus.tokenizer_hash,
        corpus.end_of_document,
    )
    assert unknown == (None,) * 5
    assert corpus.windows(np.array([2]), 9).tolist() == [list(range(18, 28))]


def test_a_window_is_one_token_longer_than_the_sequence_and_shares_it_with_the_next(tmp_path):
    stream = make_corpus(tmp_path / "c", [20])
    windows = Corpus.open(tmp_path / "c").windows(np.arange(4), 4)
    assert windows.dtype == np.int64
    assert windows.shape == (4, 5)
    assert (windows[:-1, -1] == windows[1:, 0]).all()
    assert windows[3].tolist() == stream[12:17].tolist()


@settings(max_examples=60, deadline=None)
@given(
    shard_sizes=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    sequence_length=st.integers(1, 9),
    offset=st.integers(0, 4),
    draw=st.randoms(use_true_random=False),
)
def test_windows_are_stretches_of_the_stream_across_any_shards(
    tmp_path_factory, shard_sizes, sequence_length, offset, draw
):
    folder = tmp_path_factory.mktemp("corpus")
    stream = make_corpus(folder, shard_sizes)
    corpus = Corpus.open(folder)
    count = corpus.num_windows(sequence_length, offset)
    # One more window would need a token that is not there.
    assert offset + count * sequence_length + 1 <= len(stream) or count == 0
    assert offset + (count + 1) * sequence_length + 1 > len(stream)
    ids = np.array([draw.randrange(count) for _ in range(7)] if count else [], dtype=np.int64)
    windows = corpus.windows(ids, sequence_length, offset)
    assert windows.shape == (len(ids), sequence_length + 1)
    for number, window in zip(ids.tolist(), windows.tolist(), strict=True):
        start = offset + number * sequence_length
        assert window == stream[start : start + sequence_length + 1].tolist()


def test_reading_crosses_shards(tmp_path):
    stream = make_corpus(tmp_path / "c", [5, 3, 8])
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.read(3, 12).tolist() == stream[3:12].tolist()
    assert corpus.read(16, 16).tolist() == []
    with pytest.raises(ValueError, match=r"tokens 3\.\.17 are not within the 16"):
        corpus.read(3, 17)


@pytest.mark.parametrize("ids", [[0, 5], [-1, 0]])
def test_window_ids_outside_the_corpus_are_errors(tmp_path, ids):
    make_corpus(tmp_path / "c", [21])
    with pytest.raises(ValueError, match="are not all within the 5 windows of .* at sequence_length 4, offset 0"):
        Corpus.open(tmp_path / "c").windows(np.array(ids), 4)


@pytest.mark.parametrize(("sequence_length", "offset"), [(0, 0), (4, -1)])
def test_windows_need_a_length_and_an_offset_that_can_be(tmp_path, sequence_length, offset):
    make_corpus(tmp_path / "c", [21])
    with pytest.raises(ValueError, match="no windows of sequence_length"):
        Corpus.open(tmp_path / "c").num_windows(sequence_length, offset)


def test_a_stream_shorter_than_a_window_has_none(tmp_path):
    make_corpus(tmp_path / "c", [4])
    assert Corpus.open(tmp_path / "c").num_windows(4) == 0
    assert Corpus.open(tmp_path / "c").num_windows(3, offset=9) == 0


def test_the_fingerprint_follows_the_contents_not_the_place(tmp_path):
    for name in ("one", "two"):
        make_corpus(tmp_path / name, [11, 7])
    make_corpus(tmp_path / "other", [11, 8])
    make_corpus(tmp_path / "retokenized", [11, 7], tokenizer_hash="fedcba9876543210")
    names = ("one", "two", "other", "retokenized")
    one, two, other, retokenized = (Corpus.open(tmp_path / name).fingerprint for name in names)
    assert one == two
    assert len({one, other, retokenized}) == 3


def test_the_fingerprint_of_a_prefix_follows_its_sizes(tmp_path):
    fingerprints = []
    for number in range(2):
        with ShardWriter(tmp_path / f"p{number}", 500) as writer:
            writer.add_document(np.arange(30 + number))
        fingerprints.append(Corpus.open(tmp_path / f"p{number}").fingerprint)
    assert len(set(fingerprints)) == 2


def test_no_shard_is_opened_before_it_is_needed(tmp_path, monkeypatch):
    make_corpus(tmp_path / "c", [11, 7])
    opened = []
    monkeypatch.setattr("cpt.data.corpus.Shard", lambda prefix: opened.append(prefix.name) or Shard(prefix))
    corpus = Corpus.open(tmp_path / "c")
    assert opened == []
    corpus.windows(np.array([0]), 4)
    assert opened == ["shard-00000"]


def test_there_is_no_corpus_where_there_is_nothing(tmp_path):
    with pytest.raises(
        Fault, match=r"there is no corpus at .*nowhere: neither a folder with corpus\.json nor the files"
    ):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(Fault, match=r"is no corpus: it has no corpus\.json; cpt data build makes one"):
        Corpus.open(tmp_path)


def test_a_folder_of_megatron_files_is_asked_for_its_prefix(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.arange(3))
    with pytest.raises(Fault, match=r"has no corpus\.json; for data in Megatron's format name the prefix: .*/web"):
        Corpus.open(tmp_path)


def test_missing_and_cut_shards_are_all_named(tmp_path):
    make_corpus(tmp_path / "c", [11, 7])
    (tmp_path / "c" / "shard-00000.idx").unlink()
    (tmp_path / "c" / "shard-00001.bin").write_bytes(b"12")
    with pytest.raises(Fault) as caught:
        Corpus.open(tmp_path / "c")
    first, second, way_out = caught.value.lines
    assert "shard-00000.idx is missing" in first
    assert "shard-00001.bin has 2 bytes where" in second and "tells of 14" in second
    assert "cpt data verify" in way_out and "build it again" in way_out


def test_a_shard_that_disagrees_with_the_manifest_is_refused(tmp_path):
    make_corpus(tmp_path / "c", [10])
    index = bytearray((tmp_path / "c" / "shard-00000.idx").read_bytes())
    # The same sizes, but read as int8 there would be twice as many tokens.
    index[17], index[38], index[50] = 2, 10, 10
    (tmp_path / "c" / "shard-00000.idx").write_bytes(index)
    with pytest.raises(
        Fault, match=r"shard-00000\.bin holds 20 tokens where corpus\.json tells of 10; cpt data verify"
    ):
        Corpus.open(tmp_path / "c").read(0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"has format_version 2; this release reads 1: build the corpus again"),
        ({"num_tokens": 5}, "does not add up: num_tokens is not the sum over its shards"),
        ({"shards": [{"name": "shard-00000"}]}, "lacks num_tokens, num_documents, bin_bytes"),
    ],
)
def test_a_faulty_manifest_is_refused(tmp_path, changes, message):
    make_corpus(tmp_path / "c", [11])
    change_manifest(tmp_path / "c", **changes)
    with pytest.raises(Fault, match=message):
        Corpus.open(tmp_path / "c")


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "does not hold a manifest")])
def test_a_manifest_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(Fault, match=message):
        Corpus.open(tmp_path)


def test_reading_a_corpus_needs_no_heavy_library():
    """Every rank and worker imports this; torch or pyarrow would cost it seconds."""
    script = "import sys, cpt.data.corpus; print({'torch', 'pyarrow', 'transformers', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
