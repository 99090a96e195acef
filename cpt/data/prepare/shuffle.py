"""Documents in an order drawn from a seed, whatever their number, in bounded memory.

The key of a document is the xxh64 of its number in the input, with the seed. On the way in, documents go to bucket
files by the first bits of their keys; on the way out, one bucket after the other is read in the order of its keys:

    documents in order -> bucket 0: keys 0x00..., bucket 1: keys 0x01..., ... -> documents in the order of their keys

The order does not depend on the number of buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
import xxhash

from cpt.data.prepare.spool import Spool, SpoolSize

RECORD = np.dtype([("key", "<u8"), ("num_tokens", "<i8"), ("num_bytes", "<i8"), ("corpus", "<i4")])
# Of 100 billion tokens, a bucket then holds a gigabyte or so, and the keys of its documents a hundredth of that.
NUM_BUCKETS = 256


@final
class Buckets:
    """The bucket files of a shuffle, in a folder.

    sizes: what to cut each bucket back to; none for a new shuffle.
    """

    def __init__(self, folder: Path, seed: int, token_type: np.dtype, sizes: Sequence[Sequence[int]] = ()) -> None:
        self._seed = seed
        folder.mkdir(exist_ok=True)
        sizes = sizes or [SpoolSize()] * NUM_BUCKETS
        self._spools = [
            Spool(folder / f"bucket-{index:05d}", token_type, RECORD, SpoolSize(*size))
            for index, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return len(self._spools)

    def add_document(self, document: int, corpus: int, token_ids: np.ndarray, num_bytes: int) -> None:
        """Adds a document by its number in the input; corpus: the number of the corpus that it goes to."""
        key = xxhash.xxh64_intdigest(document.to_bytes(8, "little"), seed=self._seed)
        bucket = self._spools[key * len(self._spools) >> 64]
        bucket.add(token_ids, (key, token_ids.size, num_bytes, corpus))

    def flush(self) -> None:
        """Frees the memory of what was added."""
        for spool in self._spools:
            spool.flush()

    def sync(self) -> list[SpoolSize]:
        """The sizes of all buckets, with all that they hold on the disk."""
        for spool in self._spools:
            spool.sync()
        return [spool.size for spool in self._spools]

    def documents(self, bucket: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """Corpus, token ids [tokens] and bytes of the text of each document of a bucket, in the order of the keys."""
        tokens, records = self._spools[bucket].read()
        ends = np.cumsum(records["num_tokens"])
        # Stable: should two keys be equal, the order of the input decides.
        for row in np.argsort(records["key"], kind="stable").tolist():
            end, num_tokens = int(ends[row]), int(records["num_tokens"][row])
            yield int(records["corpus"][row]), tokens[end - num_tokens : end], int(records["num_bytes"][row])

    def paths(self, bucket: int) -> list[Path]:
        """The files of a bucket."""
        return self._spools[bucket].paths
