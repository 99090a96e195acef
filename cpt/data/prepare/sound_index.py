"""Whether the index of a token file can be followed: a damaged one may point anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpt.config import Fault
from cpt.data.raw_streams import RawStream
from cpt.data.shards import Shard, idx_path

# Looked at in pieces, so that memory does not grow with the number of documents.
ENTRIES_AT_ONCE = 2**16


def refuse_damaged_index(files: Sequence[Shard | RawStream], path: str | Path) -> None:
    """Raises Fault if the index of any of the files of the corpus at `path` is damaged."""
    damage = [line for file in files for line in damage_of_index(file)]
    if damage:
        raise Fault([*damage, f"cpt data verify {path} tells more; copy the files or write them again"])


def damage_of_index(file: Shard | RawStream) -> list[str]:
    """What is wrong with the index, in a line; nothing of a sound one. The parts of a split file have one together."""
    if isinstance(file, RawStream):
        is_sound = _are_ends_sound(file)
        return [] if is_sound else [f"{file.prefix}: the ends of its documents are not in order or lie outside"]
    if _is_index_sound(file):
        return []
    return [f"{idx_path(file.prefix)}: its lengths, offsets and documents contradict each other"]


def _is_index_sound(shard: Shard) -> bool:
    begin = 0
    for first in range(0, len(shard.sequence_lengths), ENTRIES_AT_ONCE):
        part = slice(first, first + ENTRIES_AT_ONCE)
        num_bytes = shard.sequence_lengths[part].astype(np.int64) * shard.dtype.itemsize
        ends = begin + np.cumsum(num_bytes)
        if (num_bytes < 0).any() or (shard.sequence_offsets[part] != ends - num_bytes).any():
            return False
        begin = int(ends[-1])
    documents = shard.document_array
    # One more, to compare the last of a piece with the first of the next.
    pieces = (documents[first : first + ENTRIES_AT_ONCE + 1] for first in range(0, len(documents), ENTRIES_AT_ONCE))
    return documents[0] == 0 and not any((np.diff(piece) < 0).any() for piece in pieces)


def _are_ends_sound(stream: RawStream) -> bool:
    ends = stream.stated_ends
    return not ends.size or bool(ends[0] >= 0 and ends[-1] <= stream.num_tokens and (np.diff(ends) >= 0).all())
