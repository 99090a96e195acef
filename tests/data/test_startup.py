"""A run over 100 billion tokens is ready at once: its start grows with the number of files, not with what they hold."""

from __future__ import annotations

import statistics
import struct
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cpt.data.corpus import Corpus, Manifest, ShardEntry
from cpt.data.loader import Loader
from cpt.data.order import Source, StageOrder
from cpt.lineage.ledger import Ledger

LENGTH = 2048
SHARES = ["1/4", "1/8", "1/8", "1/10", "1/10", "1/10", "1/10", "1/10"]


def sparse_shard(prefix: Path, num_documents: int, document_tokens: int, dtype: str = "u2") -> tuple[int, int]:
    """A shard whose files take no room; only what opening reads is written. The sizes of both files."""
    itemsize = np.dtype(dtype).itemsize
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(itemsize * document_tokens * num_documents)
    with Path(f"{prefix}.idx").open("wb") as file:
        code = {"u2": 8, "i4": 4}[dtype]
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, num_documents, num_documents + 1))
        for position, content in (
            (34 + 4 * (num_documents - 1), struct.pack("<i", document_tokens)),
            (34 + 12 * num_documents - 8, struct.pack("<q", itemsize * document_tokens * (num_documents - 1))),
            (34 + 20 * num_documents, struct.pack("<q", num_documents)),
        ):
            file.seek(position)
            file.write(content)
        return itemsize * document_tokens * num_documents, file.tell()


def sparse_corpus(folder: Path, num_shards: int, num_documents: int, document_tokens: int = 1000) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for number in range(num_shards):
        name = f"shard-{number:05d}"
        sizes = sparse_shard(folder / name, num_documents, document_tokens)
        entries.append(ShardEntry(name, num_documents * document_tokens, num_documents, *sizes, f"{folder}{name}", ""))
    num_documents *= num_shards
    Manifest("0", 500, 0, None, num_documents * document_tokens, num_documents, 1, (), tuple(entries)).write(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Source]:
    """100 billion tokens in 8 sources, in 96 shards."""
    return sources_of(tmp_path_factory.mktemp("large"), num_documents=1_042_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Source]:
    """A thousandth of it, in as many files."""
    return sources_of(tmp_path_factory.mktemp("small"), num_documents=1_042)


def sources_of(folder: Path, num_documents: int) -> dict[str, Source]:
    corpora = [sparse_corpus(folder / f"source-{number}", 12, num_documents) for number in range(8)]
    return {corpus.name: Source(corpus, Fraction(share)) for corpus, share in zip(corpora, SHARES, strict=True)}


def start(sources: dict[str, Source]) -> StageOrder:
    order = StageOrder(sources, None, Ledger(), LENGTH, seed=1)
    assert len(order.windows(0, 512).first_token) == 512
    return order


def cpu_milliseconds(*work) -> list[float]:
    """Medians of alternating repetitions."""
    taken = [[] for _ in work]
    for _ in range(7):
        for one, values in zip(work, taken, strict=True):
            began = time.process_time()
            one()
            values.append((time.process_time() - began) * 1e3)
    return [statistics.median(values) for values in taken]


def test_the_large_run_has_100_billion_tokens(large):
    corpora = start(large).corpora
    assert sum(corpus.num_tokens for corpus in corpora) == 100_032_000_000
    assert sum(corpus.num_shards for corpus in corpora) == 96


def test_100_billion_tokens_are_ready_in_less_than_50_milliseconds_and_no_later_than_a_thousandth_of_them(large, small):
    of_large, of_small = cpu_milliseconds(lambda: start(large), lambda: start(small))
    assert of_large < 50
    assert of_large < 1.5 * of_small + 2


def test_the_start_takes_less_than_5_mebibytes(large):
    start(large)
    tracemalloc.start()
    order = start(large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order.corpora) == 8
    assert peak < 5 * 2**20


def test_any_of_the_windows_can_be_read(large):
    with Loader(start(large), 0, 1, num_slots_in_stage=512) as loader:
        batch = loader.batch(0, 64)
    assert batch.tokens.shape == (64, LENGTH + 1)
    assert not batch.tokens.any()
    assert batch.windows.first_token.max() > 2**32


@pytest.mark.parametrize("dtype", ["u2", "i4"])
def test_tokens_beyond_4_gibibytes_are_read_right(tmp_path, dtype):
    prefix = tmp_path / "large"
    sparse_shard(prefix, num_documents=3_000_000, document_tokens=1000, dtype=dtype)
    itemsize = np.dtype(dtype).itemsize
    boundaries = [2**31 // itemsize, 2**32 // itemsize, 2**31, 3_000_000_000 - 2500]
    known = np.arange(1, 5001).astype(dtype)
    with Path(f"{prefix}.bin").open("r+b") as file:
        for boundary in boundaries:
            file.seek((boundary - 2500) * itemsize)
            file.write(known.tobytes())
    corpus = Corpus.open(prefix)
    assert corpus.num_tokens == 3_000_000_000
    for boundary in boundaries:
        assert np.array_equal(corpus.read(boundary - 2500, boundary + 2500), known)
        id_, offset = divmod(boundary - 1024, LENGTH)
        (window,) = corpus.windows(np.array([id_]), LENGTH, offset)
        assert np.array_equal(window, known[2500 - 1024 : 2500 + 1025])
    every = np.array([(boundary - 2500) // 100 for boundary in boundaries])
    for window, id_, boundary in zip(corpus.windows(every, 100), every, boundaries, strict=True):
        begin = boundary - 2500
        expected = np.concatenate([np.zeros(begin - id_ * 100, dtype), known])[:101]
        assert np.array_equal(window, expected)
