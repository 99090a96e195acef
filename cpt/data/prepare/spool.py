"""Documents of token ids on their way to a shard, in files that only grow.

A spool can be cut back to any size it once had. That is how a killed build gets rid of what it wrote after its last
checkpoint, and why shards, whose checksums cannot be cut back, are made from spools and not written directly.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from cpt.config import Fault


class SpoolSize(NamedTuple):
    """How much a spool holds."""

    num_tokens: int = 0
    num_documents: int = 0


EMPTY = SpoolSize()


@final
class Spool:
    """Documents in PREFIX.tokens and PREFIX.documents; what is added waits in memory until `flush`.

    token_type: what token ids are stored as. record_type: the fields kept of each document, num_tokens among them.
    size: the size to cut the files back to. No file stays open, so that there may be thousands of spools.

    Raises Fault if the files hold less than `size`.
    """

    def __init__(self, prefix: Path, token_type: np.dtype, record_type: np.dtype, size: SpoolSize = EMPTY) -> None:
        self._types = {Path(f"{prefix}.tokens"): token_type, Path(f"{prefix}.documents"): record_type}
        self.num_tokens, self.num_documents = size
        self._tokens: list[np.ndarray] = []
        self._records: list[tuple[int, ...]] = []
        self._is_on_disk = True
        for (path, kind), count in zip(self._types.items(), size, strict=True):
            _cut(path, count * kind.itemsize)

    @property
    def size(self) -> SpoolSize:
        """What has been added so far."""
        return SpoolSize(self.num_tokens, self.num_documents)

    @property
    def paths(self) -> list[Path]:
        """The files of the spool."""
        return list(self._types)

    def add(self, token_ids: np.ndarray, record: tuple[int, ...]) -> None:
        """Adds a document of token ids [tokens]; record: its fields, in the order of the record type."""
        self._tokens.append(token_ids)
        self._records.append(record)
        self.num_tokens += token_ids.size
        self.num_documents += 1

    def flush(self) -> None:
        """Hands what waits in memory to the operating system: enough to outlive a kill, not a power cut."""
        if not self._records:
            return
        columns = (np.concatenate(self._tokens), np.array(self._records, self._record_type))
        for (path, kind), column in zip(self._types.items(), columns, strict=True):
            with path.open("ab") as file:
                file.write(column.astype(kind, copy=False).data)
        self._tokens, self._records = [], []
        self._is_on_disk = False

    def sync(self) -> None:
        """Returns when all that was added is on the disk."""
        self.flush()
        if self._is_on_disk:
            return
        for path in self._types:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._is_on_disk = True

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All token ids [tokens], still on the disk, and the records [documents]."""
        self.flush()
        tokens_path, documents_path = self._types
        records = np.fromfile(documents_path, self._record_type) if self.num_documents else self._nothing(1)
        tokens = np.memmap(tokens_path, self._types[tokens_path], "r") if self.num_tokens else self._nothing(0)
        return np.asarray(tokens), records

    def _nothing(self, column: int) -> np.ndarray:
        return np.empty(0, list(self._types.values())[column])

    @property
    def _record_type(self) -> np.dtype:
        return list(self._types.values())[1]


def _cut(path: Path, num_bytes: int) -> None:
    there = path.stat().st_size if path.exists() else 0
    if there < num_bytes:
        raise Fault(
            f"{path} holds {there:,} bytes where the build left {num_bytes:,}; it cannot go on: begin anew (--restart)"
        )
    if there > num_bytes:
        os.truncate(path, num_bytes)
