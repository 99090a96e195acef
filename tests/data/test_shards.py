"""Shards are Megatron's .bin/.idx files, bit for bit, and damaged ones are refused with a way out."""

from __future__ import annotations

import filecmp
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.data import shards
from cpt.data.shards import Shard, ShardWriter

MEGATRON_FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "fixtures" / "megatron_indexed_gpt2"
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def write(prefix: Path, documents=DOCUMENTS, vocabulary_size: int = 100) -> ShardWriter:
    with ShardWriter(prefix, vocabulary_size) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int32))
    return writer


def replace_bytes(path: Path, position: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[position : position + len(content)] = content
    path.write_bytes(whole)


def test_the_files_have_exactly_the_bytes_of_the_format(tmp_path):
    write(tmp_path / "s")
    assert (tmp_path / "s.bin").read_bytes() == struct.pack("<9H", 5, 6, 7, 8, 9, 10, 11, 12, 13)
    assert (tmp_path / "s.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 1, 5)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (128_256, "int32")])
def test_tokens_are_uint16_below_a_vocabulary_of_65500_else_int32(tmp_path, vocabulary_size, dtype):
    write(tmp_path / "s", [[0, vocabulary_size - 1]], vocabulary_size)
    shard = Shard(tmp_path / "s")
    assert shard.dtype.name == dtype
    assert shard.read(0, 2).tolist() == [0, vocabulary_size - 1]


def test_a_shard_gives_back_documents_lengths_and_stretches(tmp_path):
    write(tmp_path / "a.prefix.with.dots")
    shard = Shard(tmp_path / "a.prefix.with.dots")
    assert (shard.num_tokens, shard.num_documents) == (9, 3)
    assert [shard.document(index).tolist() for index in range(3)] == DOCUMENTS
    assert shard.document_lengths.tolist() == [3, 1, 5]
    assert shard.read(2, 5).tolist() == [7, 8, 9]
    assert shard.gather(np.array([4, 0, 4]), 3).tolist() == [[9, 10, 11], [5, 6, 7], [9, 10, 11]]


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=9))
def test_any_documents_come_back_whatever_the_piece_size_of_the_index(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("shard") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ENTRIES_AT_ONCE", 4)
        write(prefix, documents)
    shard = Shard(prefix)
    assert shard.num_tokens == sum(map(len, documents))
    assert [shard.document(index).tolist() for index in range(shard.num_documents)] == documents


def test_checksums_are_those_of_the_files(tmp_path):
    writer = write(tmp_path / "s")
    assert writer.bin_checksum == xxhash.xxh64((tmp_path / "s.bin").read_bytes()).hexdigest()
    assert writer.idx_checksum == xxhash.xxh64((tmp_path / "s.idx").read_bytes()).hexdigest()


@pytest.mark.parametrize(("ids", "wrong"), [([1, 100, 2], "100"), ([3, -1], "-1")])
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path, ids, wrong):
    with pytest.raises(Fault, match=rf"document 0 of .* has token id {wrong}, outside the vocabulary of 100"):
        write(tmp_path / "s", [ids])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_not_written_over_another(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(Fault, match=r"s\.bin is there already; remove it"):
        write(tmp_path / "s")
    assert Shard(tmp_path / "s").num_tokens == 9


def test_a_document_beyond_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LONGEST_SEQUENCE", 4)
    with pytest.raises(Fault, match="has 5 tokens; the format ends at 4: split the document"):
        write(tmp_path / "s")


def test_positions_outside_the_shard_are_errors(tmp_path):
    write(tmp_path / "s")
    shard = Shard(tmp_path / "s")
    with pytest.raises(ValueError, match=r"tokens 3\.\.10 are not within the 9"):
        shard.read(3, 10)
    with pytest.raises(ValueError, match="document 3 is not among the 3"):
        shard.document(3)


def test_the_type_byte_is_believed_not_guessed(tmp_path):
    write(tmp_path / "s", [[1, 2], [3, 4]])
    replace_bytes(tmp_path / "s.idx", 17, b"\x04")
    with pytest.raises(Fault, match="s.bin is cut short"):
        Shard(tmp_path / "s")


def test_a_document_array_left_empty_by_a_merge_is_repaired(tmp_path):
    write(tmp_path / "s")
    index = (tmp_path / "s.idx").read_bytes()
    merged = index[:26] + struct.pack("<Q", 1) + index[34 : 34 + 12 * 3] + struct.pack("<q", 0)
    (tmp_path / "s.idx").write_bytes(merged)
    shard = Shard(tmp_path / "s")
    assert shard.num_documents == 3
    assert [shard.document(index).tolist() for index in range(3)] == DOCUMENTS


def test_documents_of_several_sequences_are_read_whole(tmp_path):
    write(tmp_path / "s")
    index = (tmp_path / "s.idx").read_bytes()
    (tmp_path / "s.idx").write_bytes(
        index[:26] + struct.pack("<Q", 3) + index[34 : 34 + 12 * 3] + struct.pack("<3q", 0, 2, 3)
    )
    shard = Shard(tmp_path / "s")
    assert [shard.document(index).tolist() for index in range(2)] == [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
    assert shard.document_lengths.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (0, b"TNTIDX\x00\x00", "old index .* --dataset-impl mmap, or from the text with cpt data build"),
        (0, b"PK\x03\x04", "is no Megatron index: it begins with .* check the prefix"),
        (9, b"\x02", "has version 2 of Megatron's index format; only 1 is known"),
        (17, b"\x06", "floating-point numbers .type code 6"),
        (17, b"\x07", "floating-point numbers .type code 7"),
        (17, b"\x09", "unknown type code 9; known: 1, 2, 3, 4, 5, 8"),
        (18, b"\x09", r"s\.idx is cut short: 102 bytes of 174; copy or build it again"),
        (18, b"\x02", r"s\.idx has 102 bytes where its header tells of 90"),
    ],
)
def test_foreign_and_damaged_indexes_are_refused(tmp_path, position, content, message):
    write(tmp_path / "s")
    replace_bytes(tmp_path / "s.idx", position, content)
    with pytest.raises(Fault, match=message):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("s.bin", 16, r"s\.bin is cut short: 16 bytes where s\.idx tells of 18"),
        ("s.idx", 100, r"s\.idx is cut short: 100 bytes of 102"),
        ("s.idx", 20, r"s\.idx is cut short: 20 bytes, less than a header"),
        ("s.idx", 0, r"s\.idx is no Megatron index"),
    ],
)
def test_truncated_files_are_refused(tmp_path, name, size, message):
    write(tmp_path / "s")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(Fault, match=message):
        Shard(tmp_path / "s")


def test_a_bin_file_longer_than_its_index_is_refused(tmp_path):
    write(tmp_path / "s")
    with (tmp_path / "s.bin").open("ab") as file:
        file.write(b"\x01\x00")
    with pytest.raises(Fault, match=r"s\.bin is too long: 20 bytes where s\.idx tells of 18"):
        Shard(tmp_path / "s")


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "s")
    (tmp_path / "s.bin").unlink()
    with pytest.raises(Fault, match=r"cannot read .*s\.bin: .*; a shard is two files, PREFIX\.bin and PREFIX\.idx"):
        Shard(tmp_path / "s")


def test_opening_does_not_read_the_index(tmp_path):
    """A sparse shard of 10 billion tokens and 100 million documents opens like a small one."""
    num_documents, length = 10**8, 100
    with (tmp_path / "s.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, num_documents, num_documents + 1))
        for position, content in (
            (34 + 4 * (num_documents - 1), struct.pack("<i", length)),
            (34 + 12 * num_documents - 8, struct.pack("<q", 2 * length * (num_documents - 1))),
            (34 + 20 * num_documents, struct.pack("<q", num_documents)),
        ):
            file.seek(position)
            file.write(content)
    with (tmp_path / "s.bin").open("wb") as file:
        file.truncate(2 * length * num_documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", None)
        shard = Shard(tmp_path / "s")
    assert (shard.num_tokens, shard.num_documents) == (10**10, 10**8)


@pytest.mark.skipif(not MEGATRON_FOLDER.exists(), reason="the files written by Megatron are not here")
def test_files_that_megatron_wrote_are_read_and_written_identically(tmp_path):
    prefix = MEGATRON_FOLDER / "meg-gpt2-openwebtext_text_document"
    shard = Shard(prefix)
    assert (shard.num_documents, shard.num_tokens, shard.dtype.name) == (1000, 1_361_845, "uint16")
    with ShardWriter(tmp_path / "s", vocabulary_size=5000) as writer:
        for index in range(shard.num_documents):
            assert shard.document(index)[-1] == 4999
            writer.add_document(shard.document(index))
    for ending in ("bin", "idx"):
        assert filecmp.cmp(f"{prefix}.{ending}", tmp_path / f"s.{ending}", shallow=False)
