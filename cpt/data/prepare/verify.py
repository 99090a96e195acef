"""The search for damage in a corpus: bytes that changed, ids and documents that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.corpus import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, ShardEntry, faults_of_sizes, find_prefix
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import Shard, bin_path, idx_path

TOKENS_AT_ONCE = 2**22
BYTES_AT_ONCE = 2**24


def verify_corpus(path: str | Path) -> list[str]:
    """The damage found in a corpus, a line each; empty for a sound one.

    Reads everything, tokens in bounded pieces; memory grows with the number of documents of one shard only.
    Looks at sizes and checksums of the shards, at ids beyond the vocabulary, at documents that are empty or do not end
    as the manifest says, and at the tokenizer. A bare prefix is only held against its own index.

    Raises Fault if there is no corpus at path.
    """
    path = Path(path)
    if not (path / MANIFEST_NAME).exists():
        return _damage_of_prefix(find_prefix(path), None)
    try:
        manifest = Manifest.read(path)
    except Fault as fault:
        return list(fault.lines)
    damage = [line for entry in manifest.shards for line in _damage_of_entry(path, entry, manifest)]
    return damage + _damage_of_tokenizer(path, manifest)


def _damage_of_entry(folder: Path, entry: ShardEntry, manifest: Manifest) -> list[str]:
    damage = faults_of_sizes(folder, entry)
    if damage:
        return damage
    prefix = folder / entry.name
    for file, expected in ((bin_path(prefix), entry.bin_xxh64), (idx_path(prefix), entry.idx_xxh64)):
        found = _checksum(file)
        if found != expected:
            damage.append(f"{file} has checksum {found} where the manifest tells of {expected}: its bytes were changed")
    return damage + _damage_of_prefix(prefix, manifest, entry)


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh64()
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            checksum.update(piece)
    return checksum.hexdigest()


def _damage_of_prefix(prefix: Path, manifest: Manifest | None, entry: ShardEntry | None = None) -> list[str]:
    try:
        shard = Shard(prefix)
    except Fault as fault:
        return list(fault.lines)
    # Before anything is looked up by position: a damaged index may point anywhere.
    if not _is_index_sound(shard):
        return [f"{idx_path(prefix)}: its lengths, offsets and documents contradict each other"]
    damage = [
        f"{prefix}: {name} is {getattr(shard, name):,} where the manifest tells of {getattr(entry, name):,}"
        for name in ("num_tokens", "num_documents")
        if entry and getattr(shard, name) != getattr(entry, name)
    ]
    damage += _damage_of_ids(shard, manifest.vocabulary_size if manifest else None)
    return damage + _damage_of_documents(shard, manifest.end_of_document if manifest else None)


def _is_index_sound(shard: Shard) -> bool:
    lengths, documents = shard.sequence_lengths, shard.document_array
    ends = np.cumsum(lengths, dtype=np.int64) * shard.dtype.itemsize
    return (
        bool((lengths >= 0).all())
        and bool((shard.sequence_offsets == np.concatenate(([0], ends[:-1]))[: len(lengths)]).all())
        and documents[0] == 0
        and bool((np.diff(documents) >= 0).all())
    )


def _damage_of_documents(shard: Shard, end_of_document: int | None) -> list[str]:
    damage = []
    starts = shard.document_starts
    has_tokens = np.diff(starts) > 0
    num_empty = int(np.count_nonzero(~has_tokens))
    if num_empty:
        damage.append(f"{shard.prefix} has {num_empty:,} empty documents")
    if end_of_document is not None:
        num_endless = int(np.count_nonzero(shard.tokens[starts[1:][has_tokens] - 1] != end_of_document))
        if num_endless:
            damage.append(
                f"{shard.prefix} has {num_endless:,} documents that do not end in token {end_of_document}, "
                "the end of a document by the manifest"
            )
    return damage


def _damage_of_ids(shard: Shard, vocabulary_size: int | None) -> list[str]:
    smallest = largest = 0
    num_beyond = 0
    for start in range(0, shard.num_tokens, TOKENS_AT_ONCE):
        tokens = shard.read(start, min(start + TOKENS_AT_ONCE, shard.num_tokens))
        smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
        beyond = tokens < 0 if vocabulary_size is None else (tokens < 0) | (tokens >= vocabulary_size)
        num_beyond += int(np.count_nonzero(beyond))
    if not num_beyond:
        return []
    limit = "below 0" if vocabulary_size is None else f"outside the vocabulary of {vocabulary_size:,}"
    return [f"{bin_path(shard.prefix)} has {num_beyond:,} token ids {limit}, from {smallest} to {largest}"]


def _damage_of_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    try:
        tokenizer = Tokenizer.open(folder / TOKENIZER_FOLDER)
    except Fault as fault:
        return list(fault.lines)
    if tokenizer.hash == manifest.tokenizer_hash:
        return []
    is_another = f"has hash {tokenizer.hash} where the manifest tells of {manifest.tokenizer_hash}"
    return [f"{tokenizer.deciding_file} {is_another}: it is not the tokenizer that made the tokens"]
