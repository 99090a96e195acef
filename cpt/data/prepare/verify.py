"""The search for damage in a corpus: bytes that changed, ids and documents that cannot be; and what is told besides."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.corpus import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, ShardEntry, faults_of_sizes, find_prefix
from cpt.data.prepare.corpora import refuse_folder_of_corpora
from cpt.data.prepare.counted import counted
from cpt.data.prepare.sound_index import damage_of_index
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.raw_streams import RawStreams, open_raw_streams
from cpt.data.shards import Shard, bin_path, idx_path
from cpt.data.token_file import TokenFile

TOKENS_AT_ONCE = 2**22
BYTES_AT_ONCE = 2**24
# Token ids from here on are of no model; read as another type, damaged or foreign files are full of them.
NO_MODELS_ID = 2**31


@dataclass(frozen=True)
class Verification:
    """What was found, a line each: facts that are told of every corpus, and damage, of which a sound one has none."""

    facts: tuple[str, ...]
    damage: tuple[str, ...]


@dataclass
class _Tally:
    """Counts over the files of a corpus. last_tokens: how many documents end in each token."""

    num_tokens: int = 0
    num_documents: int = 0
    num_empty: int = 0
    smallest: int | None = None
    largest: int | None = None
    last_tokens: Counter[int] = field(default_factory=Counter)


def verify_corpus(path: str | Path, vocabulary_size: int | None = None) -> Verification:
    """Facts and damage of a corpus: a folder, a bare Megatron prefix, or raw files as `cpt.data.raw_streams` has them.

    Reads everything, tokens in bounded pieces; memory grows with the number of documents of one shard only.
    Looks at sizes and checksums of the shards, at ids beyond the vocabulary, at documents that do not end as the
    manifest says, and at the tokenizer. Files without a manifest are held against their own index only; give
    `vocabulary_size` to have their ids checked as well.

    Raises Fault if there is no corpus at path.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        try:
            manifest = Manifest.read(path)
        except Fault as fault:
            return Verification((), fault.lines)
        return _verify_folder(path, manifest, vocabulary_size)
    refuse_folder_of_corpora(path)
    try:
        raw = open_raw_streams(path)
    except Fault as fault:
        if not _are_files_there(path):
            raise
        return Verification((), fault.lines)
    tally = _Tally()
    if raw:
        damage = _damage_of_raw(raw, tally, vocabulary_size)
    else:
        damage = _damage_of_prefix(find_prefix(path), tally, vocabulary_size)
    return Verification(tuple(_facts(tally, vocabulary_size, raw.end_of_document if raw else None)), tuple(damage))


def _are_files_there(path: Path) -> bool:
    """Whether a path that cannot be opened names files that are there and of a known type, and so must be damaged."""
    name = re.sub(r":(uint16|uint32|int32)(:end=\d+)?$", "", str(path))
    return not str(path).endswith(".npy") and bool(glob.glob(name) or idx_path(path).exists())


def _verify_folder(folder: Path, manifest: Manifest, vocabulary_size: int | None) -> Verification:
    tally = _Tally()
    vocabulary_size = vocabulary_size or manifest.vocabulary_size
    damage = [
        line for entry in manifest.shards for line in _damage_of_entry(folder, entry, manifest, tally, vocabulary_size)
    ]
    num_shards = len(manifest.shards)
    facts = [f"{counted(num_shards, 'shard')}, {2 * num_shards:,} checksums compared"]
    facts += _facts(tally, vocabulary_size, manifest.end_of_document)
    if manifest.packed_length:
        facts.append(
            f"packed into bins of {manifest.packed_length:,} tokens, {manifest.num_padding:,} tokens of padding; "
            "documents of one token are not counted among the ends"
        )
    damage += _damage_of_tokenizer(folder, manifest)
    facts.append(f"tokenizer of the manifest: {manifest.tokenizer_hash}")
    return Verification(tuple(facts), tuple(damage))


def _facts(tally: _Tally, vocabulary_size: int | None, end_of_document: int | None) -> list[str]:
    ids = "no token ids"
    limit = "not known" if vocabulary_size is None else f"{vocabulary_size:,}"
    if tally.largest is not None:
        ids = f"token ids from {tally.smallest:,} to {tally.largest:,}"
        if vocabulary_size is None:
            limit += f", but it must be above {tally.largest:,}; --vocabulary checks it"
    facts = [
        f"{counted(tally.num_tokens, 'token')} in {counted(tally.num_documents, 'document')}, "
        f"{tally.num_empty:,} of them empty",
        f"{ids}; size of the vocabulary: {limit}",
    ]
    num_ended = sum(tally.last_tokens.values())
    if num_ended:
        end, which = end_of_document, "the end of a document"
        if end is None:
            end, which = tally.last_tokens.most_common(1)[0][0], "the commonest last one, as no end is known"
        facts.append(f"documents that end in token {end}, {which}: {tally.last_tokens[end] / num_ended:.2%}")
    return facts


def _damage_of_entry(
    folder: Path, entry: ShardEntry, manifest: Manifest, tally: _Tally, vocabulary_size: int
) -> list[str]:
    damage = faults_of_sizes(folder, entry)
    if damage:
        return damage
    prefix = folder / entry.name
    for file, expected in ((bin_path(prefix), entry.bin_xxh64), (idx_path(prefix), entry.idx_xxh64)):
        found = _checksum(file)
        if found != expected:
            damage.append(f"{file} has checksum {found} where the manifest tells of {expected}: its bytes were changed")
    return damage + _damage_of_prefix(prefix, tally, vocabulary_size, manifest, entry)


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh64()
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            checksum.update(piece)
    return checksum.hexdigest()


def _damage_of_prefix(
    prefix: Path,
    tally: _Tally,
    vocabulary_size: int | None,
    manifest: Manifest | None = None,
    entry: ShardEntry | None = None,
) -> list[str]:
    try:
        shard = Shard(prefix)
    except Fault as fault:
        return list(fault.lines)
    # Before anything is looked up by position: a damaged index may point anywhere.
    contradictions = damage_of_index(shard)
    if contradictions:
        return contradictions
    damage = [
        f"{prefix}: {name} is {getattr(shard, name):,} where the manifest tells of {getattr(entry, name):,}"
        for name in ("num_tokens", "num_documents")
        if entry and getattr(shard, name) != getattr(entry, name)
    ]
    damage += _damage_of_ids(shard, bin_path(prefix), tally, vocabulary_size)
    # What is packed holds pieces of documents, and padding.
    is_packed = manifest is not None and manifest.packed_length is not None
    last_tokens = _count_documents(shard, tally, shortest=2 if is_packed else 1)
    end = None if manifest is None or is_packed else manifest.end_of_document
    num_endless = 0 if end is None else sum(last_tokens.values()) - last_tokens[end]
    if num_endless:
        damage.append(
            f"{prefix} has {counted(num_endless, 'document')} that {'does' if num_endless == 1 else 'do'} not end in "
            f"token {end}, "
            "the end of a document by the manifest"
        )
    return damage


def _damage_of_raw(raw: RawStreams, tally: _Tally, vocabulary_size: int | None) -> list[str]:
    damage = damage_of_index(raw.index) if raw.index else []
    if damage:
        return damage
    for stream in raw.files:
        contradictions = damage_of_index(stream)
        if contradictions:
            damage += contradictions
            continue
        damage += _damage_of_ids(stream, stream.prefix, tally, vocabulary_size)
        _count_documents(stream, tally)
        # One that a datatrove index ends where the one before ends; reading passes over it.
        ends = stream.stated_ends
        num_empty = len(ends) - len(np.unique(ends[ends > 0]))
        tally.num_empty += num_empty
        tally.num_documents += num_empty
    return damage


def _count_documents(file: TokenFile, tally: _Tally, shortest: int = 1) -> Counter[int]:
    """Counts the documents, and how many of at least `shortest` tokens end in each token."""
    starts = file.document_starts
    lengths = np.diff(starts)
    tally.num_documents += len(lengths)
    tally.num_empty += int(np.count_nonzero(lengths == 0))
    ids, counts = np.unique(file.tokens[starts[1:][lengths >= shortest] - 1], return_counts=True)
    last_tokens = Counter(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    tally.last_tokens += last_tokens
    return last_tokens


def _damage_of_ids(file: TokenFile, path: Path, tally: _Tally, vocabulary_size: int | None) -> list[str]:
    lows, highs = [], []
    num_beyond = 0
    end = NO_MODELS_ID if vocabulary_size is None else vocabulary_size
    for start in range(0, file.num_tokens, TOKENS_AT_ONCE):
        tokens = file.read(start, min(start + TOKENS_AT_ONCE, file.num_tokens))
        lows.append(int(tokens.min()))
        highs.append(int(tokens.max()))
        num_beyond += int(np.count_nonzero((tokens < 0) | (tokens >= end)))
    tally.num_tokens += file.num_tokens
    if lows:
        tally.smallest = min([*lows, *([] if tally.smallest is None else [tally.smallest])])
        tally.largest = max([*highs, *([] if tally.largest is None else [tally.largest])])
    if not num_beyond:
        return []
    limit = f"outside the vocabulary of {end:,}"
    if vocabulary_size is None:
        # No type holds both kinds.
        limit = "below 0" if min(lows) < 0 else f"from {end:,} on, which no model has"
    return [f"{path} has {counted(num_beyond, 'token id')} {limit}, from {min(lows)} to {max(highs)}"]


def _damage_of_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    try:
        tokenizer = Tokenizer.open(folder / TOKENIZER_FOLDER)
    except Fault as fault:
        return list(fault.lines)
    if tokenizer.hash == manifest.tokenizer_hash:
        return []
    is_another = f"has hash {tokenizer.hash} where the manifest tells of {manifest.tokenizer_hash}"
    return [f"{tokenizer.deciding_file} {is_another}: it is not the tokenizer that made the tokens"]
