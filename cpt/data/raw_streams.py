"""Tokens that other programs left in files without a header, read as corpora.

    part-*.npy:uint16:end=0      OLMo's raw streams (no NumPy files, whatever they are called); any file of tokens
    pile.ds, part-*.ds           datatrove's: PATH.ds with PATH.ds.index and PATH.ds.metadata
    document                     Megatron's document.idx with document-00000-of-00020.bin and so on

A header could say of which type the tokens are. Without one the path does (`:uint16`), or a file beside; it is never
guessed. Files of a glob are one stream, in the order of their names.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.shards import Shard, bin_path, idx_path
from cpt.data.token_file import TokenFile, starts_between

TYPES = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4"}
# PATH:TYPE or PATH:TYPE:end=ID
_DECLARED = re.compile(r"(?P<path>.+?):(?P<type>[a-z]+\d+)(?::end=(?P<end>\d+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.bin")
NUMPY_MAGIC = b"\x93NUMPY"
TOKENS_AT_ONCE = 2**24
# A fingerprint reads so many blocks of so many bytes, evenly spread from the beginning to the end: a millisecond or
# two for any size, and two corpora of equal sizes are told apart.
_BLOCKS_IN_FINGERPRINT, _BYTES_OF_BLOCK = 64, 4096


class RawStreams(NamedTuple):
    """The files of a corpus, in order; the token that ends a document, where it is known; a name of the contents.

    index: of the parts of a split file.
    """

    files: list[RawStream]
    end_of_document: int | None
    fingerprint: str
    index: Shard | None = None


class RawStream(TokenFile):
    """One file that is nothing but tokens; by itself it does not tell documents apart.

    Raises Fault if the file is missing or does not hold a whole number of tokens.
    """

    def __init__(self, file: Path, dtype: np.dtype) -> None:
        super().__init__(file, file)
        self.dtype = dtype
        num_bytes = _size(file)
        if num_bytes % dtype.itemsize:
            raise Fault(
                f"{file} has {num_bytes:,} bytes, no whole number of {dtype.name} tokens; it is damaged or of another "
                "type: copy it again, or name its true type"
            )
        self.num_tokens = num_bytes // dtype.itemsize

    @cached_property
    def stated_ends(self) -> np.ndarray:
        """The token after each document as the files have it, sound or not, int64."""
        return np.empty(0, np.int64)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """First token of each document and, last, the number of tokens, int64 [documents + 1]."""
        # What follows the last end, if anything, is a document too.
        return np.unique(np.concatenate(([0], self.stated_ends, [self.num_tokens])).astype(np.int64))

    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches; see `TokenFile`."""
        return np.empty(0, np.int64), np.empty(0, np.int64)

    @property
    def num_documents(self) -> int:
        """How many documents the stream is cut into."""
        return len(self.document_starts) - 1

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, read-only, without a copy."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document {index} is not among the {self.num_documents} of {self.prefix}")
        return self.read(*self.document_starts[index : index + 2].tolist())


def open_raw_streams(path: str | Path) -> RawStreams | None:
    """The streams at a path as the head of this file has them; None if the path is none of those.

    Looks at the sizes of the files and at a few bytes of each. Raises Fault for what is missing or does not fit.
    """
    declared = _DECLARED.fullmatch(str(path))
    if declared:
        return _declared_streams(declared["path"], declared["type"], declared["end"])
    if str(path).endswith(".npy"):
        raise Fault(
            f"{path} holds raw tokens and does not say of which type; name it, {path}:uint16 or {path}:uint32, "
            "with :end=ID behind if a token of that id ends each document"
        )
    if str(path).endswith(".ds"):
        return _of_files([_open_datatrove(file) for file in _files(str(path))], None)
    prefix = path.with_suffix("") if Path(path).suffix == ".idx" else Path(path)
    if idx_path(prefix).exists() and not bin_path(prefix).exists():
        return _open_split(prefix)
    return None


def _declared_streams(path: str, type_name: str, end: str | None) -> RawStreams:
    if type_name not in TYPES:
        raise Fault(f"{path}:{type_name}: tokens are not stored as {type_name}; known: {', '.join(TYPES)}")
    dtype = np.dtype(TYPES[type_name])
    end_of_document = None if end is None else int(end)
    if end_of_document is not None and end_of_document > np.iinfo(dtype).max:
        raise Fault(f"{path}:{type_name}:end={end}: {type_name} holds no {end}; name the id of the token, or no end")
    streams = []
    for file in _files(path):
        streams.append(RawStream(file, dtype) if end is None else _EndedByToken(file, dtype, end_of_document))
        with file.open("rb") as opened:
            if opened.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                raise Fault(
                    f"{file} is a NumPy file with a header, not raw tokens; write its tokens with "
                    "numpy.load(FILE).tofile(NEW_FILE)"
                )
    return _of_files(streams, end_of_document)


def _files(path: str) -> list[Path]:
    files = sorted(map(Path, glob.glob(path))) if glob.has_magic(path) else [Path(path)]
    if not files:
        raise Fault(f"no files match {path}")
    return files


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise Fault(f"cannot read {file}: {error.strerror}") from error


def _of_files(files: list[RawStream], end_of_document: int | None) -> RawStreams:
    """With the fingerprint: of the types, the sizes, and samples of all."""
    contents = xxhash.xxh64()
    for stream in files:
        contents.update(f"{stream.dtype.name} {stream.num_tokens}\n".encode())
    for block in _samples([stream.prefix for stream in files]):
        contents.update(block)
    return RawStreams(files, end_of_document, contents.hexdigest())


class _EndedByToken(RawStream):
    """A token of one id ends each document; the file begins with one."""

    def __init__(self, file: Path, dtype: np.dtype, end_of_document: int) -> None:
        super().__init__(file, dtype)
        self._end_of_document = end_of_document

    @cached_property
    def stated_ends(self) -> np.ndarray:
        """The token after each document, int64; read from all the tokens."""
        starts = range(0, self.num_tokens, TOKENS_AT_ONCE)
        pieces = [self._ends_within(start, start + TOKENS_AT_ONCE) for start in starts]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches; see `TokenFile`."""
        found = []
        for first, stop in zip(first_tokens.tolist(), stop_tokens.tolist(), strict=True):
            # A document begins where the token before ends one, and at the beginning of the file.
            starts = self._ends_within(max(0, first - 1), max(0, stop - 1))
            found.append(np.insert(starts, 0, 0) if first == 0 < stop else starts)
        stretches = np.repeat(np.arange(len(found)), [len(starts) for starts in found])
        return stretches, np.concatenate(found) if found else np.empty(0, np.int64)

    def _ends_within(self, first: int, stop: int) -> np.ndarray:
        return first + 1 + np.flatnonzero(self.tokens[first:stop] == self._end_of_document)


def _open_datatrove(file: Path) -> RawStream:
    """One .ds file; the type of its tokens follows from its metadata."""
    index, metadata = Path(f"{file}.index"), Path(f"{file}.metadata")
    missing = [str(path) for path in (file, index, metadata) if not path.is_file()]
    if missing:
        raise Fault(
            f"{missing[0]} is missing; datatrove writes {file.name}, {index.name} and {metadata.name}. "
            f"Without the last two, name the type of the tokens: {file}:uint16"
        )
    num_bytes = _size(file)
    num_tokens, token_bytes = _read_metadata(metadata, num_bytes)
    if token_bytes not in (2, 4) or num_tokens * token_bytes != num_bytes:
        raise Fault(
            f"{file} has {num_bytes:,} bytes where {metadata.name} tells of {num_tokens:,} tokens, which take 2 or 4 "
            "bytes each; copy or write all three files again"
        )
    with index.open("rb") as opened:
        opened.seek(max(0, _size(index) - 8))
        last = opened.read()
    if _size(index) % 8 or int.from_bytes(last, "little") != num_tokens:
        raise Fault(f"{index} does not end at the {num_tokens:,} tokens of {file.name}; copy or write both files again")
    return _Datatrove(file, np.dtype(f"<u{token_bytes}"), index)


class _Datatrove(RawStream):
    """A .ds file: its index holds the token after each document."""

    def __init__(self, file: Path, dtype: np.dtype, index: Path) -> None:
        super().__init__(file, dtype)
        self._index = index

    @cached_property
    def _mapped_ends(self) -> np.ndarray:
        return np.asarray(np.memmap(self._index, dtype="<u8", mode="r"))

    @cached_property
    def stated_ends(self) -> np.ndarray:
        """The token after each document as the index has it, sound or not, int64."""
        return self._mapped_ends.astype(np.int64)

    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches; see `TokenFile`."""
        return starts_between(self._starts_of, len(self._mapped_ends), first_tokens, stop_tokens)

    def _starts_of(self, documents: np.ndarray) -> np.ndarray:
        # A document begins where the one before ends, the first at 0.
        return np.where(documents == 0, 0, self._mapped_ends[documents - 1].astype(np.int64))


def _read_metadata(metadata: Path, num_bytes: int) -> tuple[int, int]:
    """Number of tokens and bytes of each. Two lines matter: `TOKENIZER|BYTES`, without |BYTES in old files; tokens."""
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
        num_tokens = int(lines[1])
        _, bar, token_bytes = lines[0].rpartition("|")
        return num_tokens, int(token_bytes) if bar else num_bytes // max(1, num_tokens)
    except (IndexError, ValueError) as error:
        raise Fault(
            f"{metadata} is not as datatrove writes it: TOKENIZER|BYTES in its first line, the number of tokens in its "
            "second; write it again"
        ) from error


class _IndexOfParts(Shard):
    """The .idx file of a .bin file that was split."""

    def __init__(self, prefix: Path, parts: list[Path]) -> None:
        self._parts = parts
        super().__init__(prefix)

    def _size_of_bin(self) -> int:
        return sum(_size(part) for part in self._parts)


def _open_split(prefix: Path) -> RawStreams | None:
    """The parts PREFIX-00000-of-NNNNN.bin; None if there are none. A document cut by a part's end counts in both."""
    found = prefix.parent.glob(f"{glob.escape(prefix.name)}-*.bin")
    numbers = {path: match for path in found if (match := _PART.fullmatch(path.name[len(prefix.name) :]))}
    parts = sorted(numbers)
    if not parts:
        return None
    there = [int(numbers[part][1]) for part in parts]
    last = int(numbers[parts[0]][2])
    # Pythia's parts count to NNNNN, others end one before.
    expected = range(last + 1 if last in there else last)
    if len({match[2] for match in numbers.values()}) > 1 or there != list(expected):
        absent = sorted(set(expected) - set(there))
        what = f"part {absent[0]} is missing" if absent else "they are of several splits"
        raise Fault(f"the parts {prefix}-*.bin do not make one file: {what}; put all parts of one split there")
    index = _IndexOfParts(prefix, parts)
    files: list[RawStream] = []
    first_token = 0
    for part in parts:
        files.append(_Part(part, index, first_token))
        first_token += files[-1].num_tokens
    return RawStreams(files, None, fingerprint_of_prefix(prefix, parts), index)


class _Part(RawStream):
    """A part of a .bin file that was split; the index is that of the whole file, where it begins at `first_token`."""

    def __init__(self, file: Path, index: Shard, first_token: int) -> None:
        super().__init__(file, index.dtype)
        self._index, self._first_token = index, first_token

    @cached_property
    def stated_ends(self) -> np.ndarray:
        """The token after each document that ends within the part, int64."""
        ends = self._index.document_starts - self._first_token
        return ends[(ends > 0) & (ends < self.num_tokens)]

    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches, not those that go on in them; see `TokenFile`."""
        stretches, starts = self._index.starts_within(first_tokens + self._first_token, stop_tokens + self._first_token)
        return stretches, starts - self._first_token


def fingerprint_of_prefix(prefix: Path, bins: Sequence[Path]) -> str:
    """A name of the contents of a Megatron prefix, which has no checksums: of sizes and samples of both files.

    `bins`: the file with the tokens, or the parts it was split into, which does not change the name.
    """
    index = idx_path(prefix)
    contents = xxhash.xxh64(f"{index.stat().st_size} {sum(path.stat().st_size for path in bins)}".encode())
    for files in ([index], bins):
        for block in _samples(files):
            contents.update(block)
    return contents.hexdigest()


def _samples(files: Sequence[Path]) -> Iterator[bytes]:
    """Blocks of these files, read as one, from the beginning to the end."""
    ends = np.cumsum([path.stat().st_size for path in files])
    last_start = max(0, int(ends[-1]) - _BYTES_OF_BLOCK)
    places = {last_start * block // (_BLOCKS_IN_FINGERPRINT - 1) for block in range(_BLOCKS_IN_FINGERPRINT)}
    for start in sorted(places):
        missing = _BYTES_OF_BLOCK
        while missing and start < ends[-1]:
            number = int(np.searchsorted(ends, start, side="right"))
            with files[number].open("rb") as file:
                file.seek(start - (int(ends[number - 1]) if number else 0))
                block = file.read(missing)
            yield block
            missing, start = missing - len(block), start + len(block)
