"""The head of Megatron's `.idx` files: what is written there, and what is refused.

PREFIX.bin holds the token ids back to back. PREFIX.idx, little-endian, tells where documents begin and end:

    offset      bytes  field
    0           9      b"MMIDIDX" and two NUL bytes
    9           8      u64 version, 1
    17          1      u8 code of the token type; 8 is uint16, 4 is int32
    18          8      u64 N, number of sequences
    26          8      u64 D, length of the document array: documents + 1
    34          4 * N  i32 length of each sequence in tokens
    34 + 4 * N  8 * N  i64 offset of each sequence in the .bin file, in bytes
    34 + 12* N  8 * D  i64 document array: 0, then the number of sequences at the end of each document
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpt.config import Fault

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODE_OF_UINT16, CODE_OF_INT32 = 8, 4
# Megatron and GPT-NeoX write uint16 below this size of vocabulary, not below 65536; readers of theirs rely on it.
SMALLEST_INT32_VOCABULARY = 65_500
LONGEST_SEQUENCE = 2**31 - 1


def token_type(vocabulary_size: int) -> np.dtype:
    """The type that token ids of this vocabulary are stored as: uint16 where it fits, else int32."""
    small = vocabulary_size < SMALLEST_INT32_VOCABULARY
    return np.dtype(TOKEN_TYPES[CODE_OF_UINT16 if small else CODE_OF_INT32])


class Header(NamedTuple):
    """What the head of an index says: type of the tokens, sequences, entries of the document array."""

    dtype: np.dtype
    num_sequences: int
    document_entries: int

    @property
    def offsets_at(self) -> int:
        """Where in the file the offsets of the sequences begin."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def documents_at(self) -> int:
        """Where in the file the document array begins."""
        return HEADER.size + 12 * self.num_sequences

    @property
    def size_of_index(self) -> int:
        """Bytes of the whole .idx file."""
        return self.documents_at + 8 * self.document_entries


def pack_header(dtype: np.dtype, num_documents: int) -> bytes:
    """The head of an index with one sequence a document."""
    code = next(code for code, name in TOKEN_TYPES.items() if np.dtype(name) == dtype)
    return HEADER.pack(MAGIC, VERSION, code, num_documents, num_documents + 1)


def parse_header(header: bytes, path: Path) -> Header:
    """The header of the index at path, judged by its bytes; Fault for another format, with a way out."""
    if header.startswith(LEGACY_MAGIC):
        raise Fault(
            f"{path} is Megatron's old index (TNTIDX), which cannot be memory-mapped; write it anew with Megatron's "
            "preprocess_data.py --dataset-impl mmap, or from the text with cpt data build"
        )
    if not header.startswith(MAGIC):
        raise Fault(f"{path} is no Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}; check the prefix")
    if len(header) < HEADER.size:
        raise Fault(f"{path} is cut short: {len(header)} bytes, less than a header; copy or build it again")
    _, version, code, num_sequences, document_entries = HEADER.unpack(header)
    if version != VERSION:
        raise Fault(f"{path} has version {version} of Megatron's index format; only {VERSION} is known")
    if code in (6, 7):
        raise Fault(
            f"{path} holds floating-point numbers (type code {code}), and programs disagree which; "
            "token ids are integers: write it anew"
        )
    if code not in TOKEN_TYPES:
        raise Fault(f"{path} has the unknown type code {code}; known: {', '.join(map(str, TOKEN_TYPES))}")
    return Header(np.dtype(TOKEN_TYPES[code]), num_sequences, document_entries)
