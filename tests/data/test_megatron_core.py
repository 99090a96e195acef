"""What we write megatron-core reads, and what it writes we read and write again byte for byte."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest

from cpt.data.corpus import Corpus
from cpt.data.shards import Shard, ShardWriter

indexed_dataset = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (pip install cpt-trainer[interop])"
)
torch = pytest.importorskip("torch")

VOCABULARIES = {"uint16": 50_304, "int32": 128_256}
LENGTHS = [5, 1, 0, 300, 0, 0, 2048, 7, 0]


def documents_of(dtype: str, lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, VOCABULARIES[dtype], length).astype(dtype) for length in lengths]


def write_ours(prefix: Path, documents: list[np.ndarray], dtype: str) -> Path:
    with ShardWriter(prefix, VOCABULARIES[dtype]) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_theirs(prefix: Path, documents: list[list[np.ndarray]], dtype: str) -> Path:
    """A shard by megatron-core, each document of some sequences."""
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(params=["uint16", "int32"])
def dtype(request) -> str:
    return request.param


@pytest.mark.parametrize("is_mapped", [True, False])
def test_megatron_core_reads_the_documents_that_we_write(tmp_path, dtype, is_mapped):
    documents = documents_of(dtype)
    prefix = write_ours(tmp_path / "ours", documents, dtype)
    theirs = indexed_dataset.IndexedDataset(str(prefix), mmap=is_mapped)
    assert theirs.index.dtype == np.dtype(dtype)
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.sequence_lengths.tolist() == LENGTHS
    for number, document in enumerate(documents):
        assert theirs[number].dtype == np.dtype(dtype)
        assert np.array_equal(theirs[number], document)
    assert np.array_equal(theirs.get(6, offset=1000, length=48), documents[6][1000:1048])


def test_both_write_the_same_bytes(tmp_path, dtype):
    documents = documents_of(dtype)
    ours = write_ours(tmp_path / "ours", documents, dtype)
    theirs = write_theirs(tmp_path / "theirs", [[document] for document in documents], dtype)
    for ending in ("bin", "idx"):
        assert filecmp.cmp(f"{ours}.{ending}", f"{theirs}.{ending}", shallow=False)


def test_what_megatron_core_writes_is_read_and_written_again_byte_for_byte(tmp_path, dtype):
    documents = documents_of(dtype)
    theirs = write_theirs(tmp_path / "theirs", [[document] for document in documents], dtype)
    shard = Shard(theirs)
    assert (shard.num_documents, shard.num_tokens, shard.dtype) == (len(documents), sum(LENGTHS), np.dtype(dtype))
    again = write_ours(tmp_path / "again", [shard.document(i) for i in range(shard.num_documents)], dtype)
    for ending in ("bin", "idx"):
        assert filecmp.cmp(f"{theirs}.{ending}", f"{again}.{ending}", shallow=False)


def test_a_document_of_several_sequences_is_read_as_one(tmp_path, dtype):
    pieces = documents_of(dtype)
    theirs = write_theirs(tmp_path / "theirs", [pieces[:2], pieces[2:3], pieces[3:]], dtype)
    shard = Shard(theirs)
    assert shard.num_documents == 3
    for index, expected in enumerate([pieces[:2], pieces[2:3], pieces[3:]]):
        assert np.array_equal(shard.document(index), np.concatenate(expected))
    corpus = Corpus.open(theirs)
    assert np.array_equal(corpus.read(0, corpus.num_tokens), np.concatenate(pieces))


def test_its_samples_are_stretches_of_our_stream(tmp_path):
    """GPTDataset cuts a shard of one epoch into the windows that we cut it into, when neither shuffles documents."""
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    del gpt_dataset
    documents = documents_of("uint16", [700, 5, 0, 1200, 64, 800])
    corpus = Corpus.open(write_ours(tmp_path / "ours", documents, "uint16"))
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    order = np.arange(len(documents), dtype=np.int32)
    places = helpers.build_sample_idx(sizes, order, 128, 1, corpus.num_tokens, True, True)
    begins = np.concatenate([[0], np.cumsum(sizes)])[places[:, 0]] + places[:, 1]
    number = corpus.num_windows(128)
    assert len(places) - 1 == number
    assert begins[:number].tolist() == [128 * i for i in range(number)]
