"""Which tokens of a stretch begin a document, for every kind of file, read from an index that is never loaded."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cpt_harness.numbered import corpus_of_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.corpus import Corpus
from cpt.data.shards import ShardWriter

LENGTHS = [[3, 1, 0, 5, 1, 1], [2], [0, 4, 7, 0]]  # of the documents of each file


def write_shard(prefix: Path, lengths: list[int]) -> Path:
    with ShardWriter(prefix, 500) as writer:
        for length in lengths:
            writer.add_document(np.ones(length, dtype=np.int64))
    return prefix


def rewrite_documents(prefix: Path, entries: list[int]) -> None:
    """Give the shard's index another document array."""
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    num_sequences = struct.unpack("<Q", content[18:26])[0]
    head = content[:26] + struct.pack("<Q", len(entries)) + content[34 : 34 + 12 * num_sequences]
    path.write_bytes(head + struct.pack(f"<{len(entries)}q", *entries))


def one_shard(folder: Path) -> Path:
    folder.mkdir()
    return write_shard(folder / "text", LENGTHS[0] + LENGTHS[2])


def repaired(folder: Path) -> Path:
    prefix = one_shard(folder)
    rewrite_documents(prefix, [0])
    return prefix


def of_several_sequences(folder: Path) -> Path:
    prefix = one_shard(folder)
    rewrite_documents(prefix, [0, 2, 2, 4, 9, 10])
    return prefix


def datatrove(folder: Path) -> Path:
    folder.mkdir()
    for name, lengths in zip("abc", LENGTHS, strict=True):
        (folder / f"{name}.ds").write_bytes(bytes(2 * sum(lengths)))
        (folder / f"{name}.ds.index").write_bytes(np.cumsum(lengths).astype("<u8").tobytes())
        (folder / f"{name}.ds.metadata").write_text(f"gpt2|2\n{sum(lengths)}\n")
    return folder / "*.ds"


def ended_by_token(folder: Path) -> str:
    folder.mkdir()
    for name, lengths in zip("abc", LENGTHS, strict=True):
        documents = [[7] * (length - 1) + [9] for length in lengths if length]
        np.array([token for document in documents for token in document] + [7], "<u2").tofile(folder / f"{name}.npy")
    return f"{folder}/*.npy:uint16:end=9"


def of_shards(corpus: Corpus) -> np.ndarray:
    """The same from what each shard tells of all its documents, bool [tokens of the stream]."""
    is_start, begin = np.zeros(corpus.num_tokens + 1, dtype=bool), 0
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        is_start[begin + shard.document_starts[:-1]] = True
        begin += shard.num_tokens
    return is_start[: corpus.num_tokens]


def assert_stretches_are_those_of(corpus: Corpus, expected: np.ndarray) -> None:
    for length in range(1, corpus.num_tokens + 1):
        first = np.arange(corpus.num_tokens - length + 1)[::-1]
        found = corpus.document_starts(first, length)
        assert found.dtype == bool
        assert np.array_equal(found, expected[first[:, None] + np.arange(length)])


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (lambda folder: corpus_of_documents(folder, LENGTHS), 8),
        (one_shard, 7),
        (repaired, 7),
        (of_several_sequences, 3),
        (datatrove, 8),
        (ended_by_token, 11),
    ],
)
def test_any_stretches_tell_what_the_shards_tell(tmp_path, kind, number):
    corpus = Corpus.open(kind(tmp_path / "c"))
    expected = of_shards(corpus)
    assert expected[0] and expected.sum() == number
    assert_stretches_are_those_of(corpus, expected)


def test_documents_of_several_sequences_begin_where_the_document_array_says(tmp_path):
    corpus = Corpus.open(of_several_sequences(tmp_path / "c"))
    # Sequences of 3, 1, 0, 5, 1, 1, 0, 4, 7, 0 tokens; the second document is empty, so is the last.
    assert np.flatnonzero(corpus.document_starts(np.array([0]), 22)).tolist() == [0, 4, 9]


def test_a_document_cut_by_the_end_of_a_part_does_not_begin_again(tmp_path):
    prefix = one_shard(tmp_path / "c")
    expected = of_shards(Corpus.open(prefix))
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").unlink()
    for number, (start, stop) in enumerate([(0, 4), (4, 12), (12, len(content))]):
        Path(f"{prefix}-{number:05d}-of-00003.bin").write_bytes(content[start:stop])
    corpus = Corpus.open(prefix)
    assert corpus.num_shards == 3
    assert_stretches_are_those_of(corpus, expected)


def test_files_that_do_not_tell_documents_apart_have_no_starts(tmp_path):
    np.arange(20, dtype="<u2").tofile(tmp_path / "a.npy")
    corpus = Corpus.open(f"{tmp_path}/a.npy:uint16")
    assert not corpus.document_starts(np.array([0, 5]), 15).any()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any), min_size=1, max_size=5),
    draw=st.randoms(use_true_random=False),
)
def test_any_documents_in_any_shards_are_found(tmp_path_factory, lengths, draw):
    corpus = Corpus.open(corpus_of_documents(tmp_path_factory.mktemp("c") / "c", lengths))
    length = draw.randint(1, corpus.num_tokens)
    first = np.array([draw.randint(0, corpus.num_tokens - length) for _ in range(5)])
    expected = of_shards(corpus)[first[:, None] + np.arange(length)]
    assert np.array_equal(corpus.document_starts(first, length), expected)


def test_no_stretches_have_no_starts(tmp_path):
    assert Corpus.open(one_shard(tmp_path / "c")).document_starts(np.empty(0, np.int64), 4).shape == (0, 4)


@pytest.mark.parametrize(("first", "length"), [([-1, 3], 2), ([0, 20], 3)])
def test_stretches_outside_the_stream_are_errors(tmp_path, first, length):
    with pytest.raises(ValueError, match=r"tokens from each of .* on are not all within the 22 of"):
        Corpus.open(one_shard(tmp_path / "c")).document_starts(np.array(first), length)


@pytest.mark.parametrize("is_repaired", [False, True])
def test_the_index_of_a_shard_is_not_loaded(tmp_path, is_repaired):
    prefix = write_shard(tmp_path / "large", [3] * 50_000)
    if is_repaired:
        rewrite_documents(prefix, [0])
    corpus = Corpus.open(prefix)
    tracemalloc.start()
    corpus.document_starts(np.array([0, 70_000, 149_980]), 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000  # a copy of one of its arrays would be 400,000


def test_the_index_of_datatrove_is_not_loaded(tmp_path):
    (tmp_path / "x.ds").write_bytes(bytes(2 * 150_000))
    (tmp_path / "x.ds.index").write_bytes(np.arange(3, 150_001, 3).astype("<u8").tobytes())
    (tmp_path / "x.ds.metadata").write_text("gpt2|2\n150000\n")
    corpus = Corpus.open(tmp_path / "x.ds")
    tracemalloc.start()
    found = corpus.document_starts(np.array([0, 70_001]), 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.astype(int).tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]
    assert peak < 50_000
