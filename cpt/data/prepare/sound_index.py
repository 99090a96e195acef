"""Whether the index of a token file can be followed: a damaged one may point anywhere."""

from __future__ import annotations

import numpy as np

from cpt.data.raw_streams import RawStream
from cpt.data.shards import Shard, idx_path


def damage_of_index(file: Shard | RawStream) -> list[str]:
    """What is wrong with the index, in a line; nothing of a sound one. The parts of a split file have one together."""
    if isinstance(file, RawStream):
        is_sound = _are_ends_sound(file)
        return [] if is_sound else [f"{file.prefix}: the ends of its documents are not in order or lie outside"]
    if _is_index_sound(file):
        return []
    return [f"{idx_path(file.prefix)}: its lengths, offsets and documents contradict each other"]


def _is_index_sound(shard: Shard) -> bool:
    lengths, documents = shard.sequence_lengths, shard.document_array
    ends = np.cumsum(lengths, dtype=np.int64) * shard.dtype.itemsize
    return (
        bool((lengths >= 0).all())
        and bool((shard.sequence_offsets == np.concatenate(([0], ends[:-1]))[: len(lengths)]).all())
        and documents[0] == 0
        and bool((np.diff(documents) >= 0).all())
    )


def _are_ends_sound(stream: RawStream) -> bool:
    ends = stream.stated_ends
    return not ends.size or bool(ends[0] >= 0 and ends[-1] <= stream.num_tokens and (np.diff(ends) >= 0).all())
