"""A packed corpus holds every token once, cuts no document that fits into a bin, and states its padding."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare import pack as packing
from cpt.data.prepare import sound_index
from cpt.data.prepare.corpus_writer import CorpusWriter, Origin
from cpt.data.prepare.pack import pack_corpus
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.verify import verify_corpus

VOCABULARY = 6000
PADDING, END = 6000, 6001


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A token for each number below VOCABULARY, padding and an end of document."""
    return write_tokenizer(tmp_path_factory.mktemp("numbers"), ["<|padding|>", "</s>"])


def write_tokenizer(folder: Path, special: list[str]) -> Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, "0"))
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder)


def write_corpus(folder: Path, tokenizer: Tokenizer, lengths: list[int], shard_tokens: int = 10**9) -> Path:
    """Documents of these lengths whose tokens count up from 0 through the corpus."""
    folder.mkdir()
    writer = CorpusWriter(folder / "c", folder / "spool", tokenizer.vocabulary_size, shard_tokens)
    start = 0
    for length in lengths:
        writer.add_document(np.arange(start, start + length, dtype=np.int32), 3 * length)
        start += length
    writer.finish(Origin(tokenizer, ["numbers"], None, None))
    return folder / "c"


def documents_of(path: Path) -> list[list[int]]:
    corpus = Corpus.open(path)
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    return [shard.document(number).tolist() for shard in shards for number in range(shard.num_documents)]


def bins_of(path: Path) -> list[list[int]]:
    """The inputs of each window of the packed length, which are the bins."""
    corpus = Corpus.open(path)
    count = corpus.num_windows(corpus.packed_length)
    return corpus.windows(np.arange(count), corpus.packed_length)[:, :-1].tolist()


def test_of_a_folder_of_corpora_one_is_to_be_packed(tmp_path, tokenizer):
    write_corpus(tmp_path / "in", tokenizer, [4])
    with pytest.raises(Fault, match=r"in is no corpus but holds some: c; name one of them, such as .*in/c"):
        pack_corpus(tmp_path / "in", 8, tmp_path / "packed")


def test_a_corpus_is_packed_as_worked_out_by_hand(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "in", tokenizer, [4, 7, 2, 6, 11])
    report = pack_corpus(path, 8, tmp_path / "packed")
    # 0-3, 4-10, 11-12, 13-18, 19-29: the last is cut after 8 tokens.
    hand = [
        [11, 12, *range(13, 19)],
        [*range(4, 11), PADDING],
        [*range(4), 27, 28, 29, PADDING],
        [*range(19, 27)],
    ]
    assert sorted(bins_of(tmp_path / "packed")) == sorted(hand)
    assert (report.num_bins, report.num_padding, report.num_tokens) == (4, 3, 33)
    # In the corpus as it was, windows begin at 0, 8, 16 and 24, in the midst of three documents.
    assert (report.num_documents, report.num_cut, report.num_cut_unpacked) == (5, 1, 3)


def test_the_manifest_states_length_and_padding_and_keeps_the_rest(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "in", tokenizer, [4, 7, 2])
    pack_corpus(path, 8, tmp_path / "packed")
    before, packed = Corpus.open(path), Corpus.open(tmp_path / "packed")
    assert (packed.packed_length, packed.num_padding, packed.num_text_tokens) == (8, 4, 13)
    assert (before.packed_length, before.num_padding, before.num_text_tokens) == (None, 0, 13)
    for name in ("tokenizer_hash", "vocabulary_size", "num_bytes", "inputs", "end_of_document", "begin_of_document"):
        assert getattr(packed.manifest, name) == getattr(before.manifest, name)
    assert verify_corpus(tmp_path / "packed").damage == ()
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == [
        "corpus.json", "shard-00000.bin", "shard-00000.idx", "tokenizer"
    ]  # fmt: skip


def test_a_manifest_from_before_packing_can_still_be_read(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "in", tokenizer, [4])
    content = json.loads((path / "corpus.json").read_text())
    for name in ("packed_length", "num_padding"):
        del content[name]
    (path / "corpus.json").write_text(json.dumps(content))
    assert (Corpus.open(path).packed_length, Corpus.open(path).num_text_tokens) == (None, 4)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=50).filter(any),
    length=st.integers(2, 20),
    group=st.integers(1, 60),
    shard_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_token_is_in_one_bin_and_whole_documents_stay_whole(lengths, length, group, shard_tokens, seed):
    tokenizer = Tokenizer.open(TOKENIZER_FOLDER.name)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "DOCUMENTS_IN_GROUP", group)
        path = write_corpus(Path(folder) / "in", tokenizer, lengths, shard_tokens)
        output = Path(folder) / "packed"
        report = pack_corpus(path, length, output, seed=seed, shard_tokens=shard_tokens)
        corpus, bins, pieces = Corpus.open(output), bins_of(output), documents_of(output)
        tokens = [token for contents in bins for token in contents]
        # The token behind the last bin is padding.
        assert len(tokens) == corpus.num_tokens - 1 == report.num_bins * length
        assert sorted(token for token in tokens if token != PADDING) == list(range(sum(lengths)))
        found = pieces.count([PADDING])
        assert found == corpus.num_padding == report.num_padding == tokens.count(PADDING) + 1
        # No document lies across the end of a bin, and none that fits is cut.
        ends = np.cumsum([len(piece) for piece in pieces])
        assert set(range(length, corpus.num_tokens, length)) <= set(ends.tolist())
        whole = [document for document in documents_of(path) if 0 < len(document) <= length]
        assert all(document in pieces for document in whole)
        assert report.num_documents == np.count_nonzero(lengths)
        assert corpus.num_bytes == 3 * sum(lengths)


TOKENIZER_FOLDER = tempfile.TemporaryDirectory()
write_tokenizer(Path(TOKENIZER_FOLDER.name), ["<|padding|>", "</s>"])


def test_the_same_request_gives_the_same_bytes_and_another_seed_another_order(tmp_path, tokenizer):
    lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
    path = write_corpus(tmp_path / "in", tokenizer, lengths)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack_corpus(path, 40, tmp_path / name, seed=seed, shard_tokens=500)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).glob("*.*")} for name in "abc"]
    assert files[0] == files[1]
    assert bins_of(tmp_path / "a") != bins_of(tmp_path / "c")
    assert sorted(bins_of(tmp_path / "a")) == sorted(bins_of(tmp_path / "c"))


def test_full_bins_do_not_cluster(tmp_path, tokenizer):
    lengths = [40] * 50 + [21] * 50
    path = write_corpus(tmp_path / "in", tokenizer, lengths)
    pack_corpus(path, 40, tmp_path / "packed")
    full = [PADDING not in contents for contents in bins_of(tmp_path / "packed")]
    assert 15 < sum(full[:50]) < 35


@pytest.mark.parametrize(("special", "padding"), [(["<|padding|>", "</s>"], 6000), (["x", "</s>"], 6001), (["x"], 0)])
def test_padding_is_the_token_for_it_else_the_end_of_a_document_else_0(tmp_path, special, padding):
    path = write_corpus(tmp_path / "in", write_tokenizer(tmp_path, special), [3])
    pack_corpus(path, 5, tmp_path / "packed")
    assert documents_of(tmp_path / "packed") == [[0, 1, 2], [padding], [padding], [padding]]


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_IN_GROUP", 2000)
    monkeypatch.setattr(sound_index, "ENTRIES_AT_ONCE", 2000)
    peaks = []
    for number, count in enumerate((20_000, 200_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = CorpusWriter(folder / "c", folder / "spool", tokenizer.vocabulary_size)
        document = np.zeros(3, np.int32)
        for _ in range(count):
            writer.add_document(document, 3)
        writer.finish(Origin(tokenizer, ["zeros"], None, None))
        corpus = Corpus.open(folder / "c")
        tracemalloc.start()
        assert sum(len(group.starts) for group in packing._groups(corpus)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_what_cannot_be_packed_is_refused(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "in", tokenizer, [4, 7])
    with pytest.raises(Fault, match="sequence_length = 1; a bin holds at least 2 tokens"):
        pack_corpus(path, 1, tmp_path / "packed")
    with pytest.raises(Fault, match="seed = -1 is no seed"):
        pack_corpus(path, 8, tmp_path / "packed", seed=-1)
    with pytest.raises(Fault, match="shard-00000 has no manifest with a tokenizer, which packing needs; build it with"):
        pack_corpus(path / "shard-00000", 8, tmp_path / "packed")
    pack_corpus(path, 8, tmp_path / "packed")
    with pytest.raises(Fault, match="is packed already, into bins of 8; pack the corpus it was made of"):
        pack_corpus(tmp_path / "packed", 4, tmp_path / "again")
    with pytest.raises(Fault, match="packed is there already; choose another --output or remove it"):
        pack_corpus(path, 8, tmp_path / "packed")


@pytest.mark.parametrize("position", [34, -24], ids=["lengths", "documents"])
def test_a_corpus_with_a_damaged_index_is_not_packed(tmp_path, tokenizer, position):
    path = write_corpus(tmp_path / "in", tokenizer, [4, 7, 2])
    content = bytearray((path / "shard-00000.idx").read_bytes())
    content[position] ^= 0x40
    (path / "shard-00000.idx").write_bytes(content)
    with pytest.raises(Fault, match=r"idx: its lengths, .* contradict each other\ncpt data verify .*/c tells more"):
        pack_corpus(path, 8, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk of .* is full; free some space or choose another --output"),
        (
            errno.EFBIG,
            r"packed: a file would grow larger than .* \(ulimit -f\) allows; raise the limit or choose another",
        ),
    ],
)
def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing(tmp_path, tokenizer, monkeypatch, number, message):
    path = write_corpus(tmp_path / "in", tokenizer, [4, 7])

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("cpt.data.shards._ChecksummedFile.write", full)
    with pytest.raises(Fault, match=message):
        pack_corpus(path, 8, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
