"""Shards: token ids on disk in Megatron's memory-mapped `.bin/.idx` format, bit for bit.

We write one sequence a document. Opening a shard reads a few dozen bytes, however large it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, final

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.megatron_index import HEADER, LONGEST_SEQUENCE, pack_header, parse_header, token_type
from cpt.data.token_file import TokenFile, starts_between

logger = logging.getLogger(__name__)

# The .idx file is written in pieces of this many entries, so that closing a shard needs little memory.
ENTRIES_AT_ONCE = 2**20


def bin_path(prefix: str | Path) -> Path:
    """The file with the token ids. The prefix may hold dots, so `with_suffix` would not do."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file that says where documents begin."""
    return Path(f"{prefix}.idx")


@final
class ShardWriter:
    """Writes one shard, document by document; the `.idx` file appears when the shard is closed.

    Use it as a context manager: leaving the block by an exception removes both files. After closing, `bin_checksum`
    and `idx_checksum` are the xxh64 of the files, in hexadecimal. Memory: four bytes a document.

    Raises Fault if the files are there already, or for token ids outside the vocabulary.
    """

    def __init__(self, prefix: str | Path, vocabulary_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocabulary_size = vocabulary_size
        self.dtype = token_type(vocabulary_size)
        self.num_tokens = 0
        self._lengths = array("i")
        taken = [str(path) for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if taken:
            raise Fault(f"{taken[0]} is there already; remove it or write to another place")
        self._bin = _ChecksummedFile(bin_path(prefix))
        self.bin_checksum = self.idx_checksum = ""

    @property
    def num_documents(self) -> int:
        """Documents of the shard, one for each sequence."""
        return len(self._lengths)

    def add_document(self, token_ids: np.ndarray) -> None:
        """Appends one document. token_ids: [tokens] of any integer type."""
        token_ids = np.asarray(token_ids)
        if token_ids.size > LONGEST_SEQUENCE:
            raise Fault(
                f"document {self.num_documents} of {self.prefix} has {token_ids.size:,} tokens; "
                f"the format ends at {LONGEST_SEQUENCE:,}: split the document"
            )
        if token_ids.size:
            smallest, largest = int(token_ids.min()), int(token_ids.max())
            if smallest < 0 or largest >= self.vocabulary_size:
                wrong = smallest if smallest < 0 else largest
                raise Fault(
                    f"document {self.num_documents} of {self.prefix} has token id {wrong}, outside the vocabulary of "
                    f"{self.vocabulary_size:,}; use the tokenizer that made the ids, or its true vocabulary size"
                )
        self._bin.write(token_ids.astype(self.dtype))
        self._lengths.append(token_ids.size)
        self.num_tokens += token_ids.size

    def close(self) -> None:
        """Writes the `.idx` file; both files are on the disk when this returns."""
        self.bin_checksum = self._bin.close()
        index = _ChecksummedFile(idx_path(self.prefix))
        try:
            self._write_index(index)
            self.idx_checksum = index.close()
        except BaseException:
            index.abandon()
            raise

    def _write_index(self, index: _ChecksummedFile) -> None:
        count = self.num_documents
        index.write(pack_header(self.dtype, count))
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if count else np.empty(0, np.int32)
        index.write(lengths.astype("<i4", copy=False))
        position = 0
        for start in range(0, count, ENTRIES_AT_ONCE):
            num_bytes = lengths[start : start + ENTRIES_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(num_bytes)
            index.write((ends - num_bytes).astype("<i8"))
            position = int(ends[-1])
        for start in range(0, count + 1, ENTRIES_AT_ONCE):
            index.write(np.arange(start, min(start + ENTRIES_AT_ONCE, count + 1), dtype="<i8"))

    def discard(self) -> None:
        """Removes what was written."""
        self._bin.abandon()
        bin_path(self.prefix).unlink(missing_ok=True)
        idx_path(self.prefix).unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise


class Shard(TokenFile):
    """Reads one shard through a memory map: `num_tokens`, `num_documents`, `dtype`, tokens and documents.

    Raises Fault for files that are missing, cut short or of another format; ValueError for positions outside.
    """

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(Path(prefix), bin_path(prefix))
        self._idx_path = idx_path(prefix)
        self._open()

    def _open(self) -> None:
        try:
            idx_bytes, bin_bytes = self._idx_path.stat().st_size, self._size_of_bin()
            with self._idx_path.open("rb") as file:
                self._header = parse_header(file.read(HEADER.size), self._idx_path)
                self.dtype = self._header.dtype
                self._check_index_size(idx_bytes)
                bin_end = self._end_of_last_sequence(file)
                last_document_end = self._last_document_end(file)
        except OSError as error:
            raise Fault(
                f"cannot read {error.filename}: {error.strerror}; a shard is two files, PREFIX.bin and PREFIX.idx"
            ) from error
        if bin_bytes != bin_end:
            state = "is cut short" if bin_bytes < bin_end else "is too long"
            raise Fault(
                f"{self._file} {state}: {bin_bytes:,} bytes where {self._idx_path.name} tells of {bin_end:,}; "
                "copy or build both files again"
            )
        self.num_tokens = bin_bytes // self.dtype.itemsize
        # GPT-NeoX's merge tool leaves the document array as [0]; every sequence is then a document, as its readers do.
        self._is_repaired = last_document_end != self._header.num_sequences
        if self._is_repaired:
            logger.info("%s: its document array is incomplete; taking each sequence as a document", self._idx_path)
        self.num_documents = self._header.num_sequences if self._is_repaired else self._header.document_entries - 1

    def _size_of_bin(self) -> int:
        return self._file.stat().st_size

    def _check_index_size(self, idx_bytes: int) -> None:
        expected = self._header.size_of_index
        if idx_bytes < expected:
            raise Fault(f"{self._idx_path} is cut short: {idx_bytes:,} bytes of {expected:,}; copy or build it again")
        # Multimodal Megatron data ends in one more byte a sequence; it does not concern the tokens.
        if idx_bytes not in (expected, expected + self._header.num_sequences):
            raise Fault(
                f"{self._idx_path} has {idx_bytes:,} bytes where its header tells of {expected:,}; "
                "it is damaged: copy or build it again"
            )

    def _last_document_end(self, file: BinaryIO) -> int:
        """Last entry of the document array: the number of sequences, if the array is whole."""
        if self._header.document_entries == 0:
            return -1
        file.seek(self._header.size_of_index - 8)
        return int.from_bytes(file.read(8), "little", signed=True)

    def _end_of_last_sequence(self, file: BinaryIO) -> int:
        """Where the last sequence ends in the .bin file, in bytes."""
        if self._header.num_sequences == 0:
            return 0
        file.seek(self._header.offsets_at - 4)
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(self._header.documents_at - 8)
        return int.from_bytes(file.read(8), "little", signed=True) + length * self.dtype.itemsize

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence as the index states them, int32 [sequences]."""
        return self._index_array("<i4", HEADER.size, self._header.num_sequences)

    @cached_property
    def sequence_offsets(self) -> np.ndarray:
        """Where each sequence begins in the .bin file, in bytes, int64 [sequences]."""
        return self._index_array("<i8", self._header.offsets_at, self._header.num_sequences)

    @cached_property
    def document_array(self) -> np.ndarray:
        """Sequences before each document and, last, all of them, int64 [documents + 1]."""
        if self._is_repaired:
            return np.arange(self._header.num_sequences + 1, dtype=np.int64)
        return self._index_array("<i8", self._header.documents_at, self._header.document_entries)

    @property
    def document_starts(self) -> np.ndarray:
        """First token of each document and, last, the number of tokens, int64 [documents + 1]."""
        starts = np.append(self.sequence_offsets // self.dtype.itemsize, self.num_tokens)
        return starts[self.document_array]

    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches; see `TokenFile`."""
        return starts_between(self._starts_of, self.num_documents, first_tokens, stop_tokens)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, read-only, without a copy."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document {index} is not among the {self.num_documents} of {self.prefix}")
        first, last = self._starts_of(np.array([index, index + 1])).tolist()
        return self.tokens[first:last]

    def _starts_of(self, documents: np.ndarray) -> np.ndarray:
        """First token of these documents, numbered from 0 to the number of documents."""
        sequences = documents if self._is_repaired else self.document_array[documents]
        is_end = sequences == self._header.num_sequences
        starts = np.full(len(documents), self.num_tokens, np.int64)
        starts[~is_end] = self.sequence_offsets[sequences[~is_end]] // self.dtype.itemsize
        return starts

    def _index_array(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self._idx_path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


class _ChecksummedFile:
    """A file that knows the xxh64 of all that was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._checksum = xxhash.xxh64()

    def write(self, data: bytes | np.ndarray) -> None:
        content = memoryview(data).cast("B") if len(data) else b""
        self._file.write(content)
        self._checksum.update(content)

    def close(self) -> str:
        self._file.flush()
        # The bytes must be on the disk before the folder gets its final name, or a power cut leaves holes in it.
        os.fsync(self._file.fileno())
        self._file.close()
        return self._checksum.hexdigest()

    def abandon(self) -> None:
        # On a full disk closing fails as writing did; the file is about to be removed.
        with contextlib.suppress(OSError):
            self._file.close()
