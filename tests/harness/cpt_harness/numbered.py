"""Corpora whose tokens count up, so that a window tells where it was cut from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpt.data.corpus import Manifest, ShardEntry
from cpt.data.shards import ShardWriter, bin_path, idx_path

VOCABULARY = 1 << 20


def numbered_corpus(folder: Path, num_tokens: int, first: int = 0, num_shards: int = 1, **changes) -> Path:
    """A corpus of the tokens `first`, `first + 1`, ... in `folder`; `changes` are to its manifest."""
    parts = np.array_split(np.arange(num_tokens), num_shards)
    return corpus_of_documents(folder, [[len(part)] for part in parts], first, **changes)


def corpus_of_documents(folder: Path, lengths: Sequence[Sequence[int]], first: int = 0, **changes) -> Path:
    """The same, its shards with documents of these lengths."""
    folder.mkdir(parents=True)
    entries, next_token = [], first
    for number, of_shard in enumerate(lengths):
        prefix = folder / f"shard-{number:05d}"
        with ShardWriter(prefix, VOCABULARY) as writer:
            for length in of_shard:
                writer.add_document(np.arange(next_token, next_token + length))
                next_token += length
        sizes = bin_path(prefix).stat().st_size, idx_path(prefix).stat().st_size
        counts = sum(of_shard), len(of_shard)
        entries.append(ShardEntry(prefix.name, *counts, *sizes, writer.bin_checksum, writer.idx_checksum))
    manifest = {
        "tokenizer_hash": "0123456789abcdef",
        "vocabulary_size": VOCABULARY,
        "end_of_document": None,
        "begin_of_document": None,
        "num_tokens": next_token - first,
        "num_documents": sum(map(len, lengths)),
        "num_bytes": 4 * (next_token - first),
        "inputs": (),
        "shards": tuple(entries),
    }
    Manifest(**{**manifest, **changes}).write(folder)
    return folder
