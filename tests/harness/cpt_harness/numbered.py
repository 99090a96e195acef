"""Corpora whose tokens count up, so that a window tells where it was cut from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpt.data.corpus import Manifest, ShardEntry
from cpt.data.shards import ShardWriter, bin_path, idx_path

VOCABULARY = 1 << 20


def numbered_corpus(folder: Path, num_tokens: int, first: int = 0, num_shards: int = 1, **changes) -> Path:
    """A corpus of the tokens `first`, `first + 1`, ... in `folder`; `changes` are to its manifest."""
    folder.mkdir(parents=True)
    entries = []
    for number, tokens in enumerate(np.array_split(np.arange(first, first + num_tokens), num_shards)):
        prefix = folder / f"shard-{number:05d}"
        with ShardWriter(prefix, VOCABULARY) as writer:
            writer.add_document(tokens)
        sizes = bin_path(prefix).stat().st_size, idx_path(prefix).stat().st_size
        entries.append(ShardEntry(prefix.name, len(tokens), 1, *sizes, writer.bin_checksum, writer.idx_checksum))
    manifest = {
        "tokenizer_hash": "0123456789abcdef",
        "vocabulary_size": VOCABULARY,
        "end_of_document": None,
        "begin_of_document": None,
        "num_tokens": num_tokens,
        "num_documents": num_shards,
        "num_bytes": 4 * num_tokens,
        "inputs": (),
        "shards": tuple(entries),
    }
    Manifest(**{**manifest, **changes}).write(folder)
    return folder
