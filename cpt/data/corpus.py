"""A corpus: a folder of token shards with a manifest, a Megatron prefix or raw files, read as one stream of tokens.

The stream is cut into windows of `sequence_length + 1` tokens; neighbours share one token, because the last token of
a window is only a target and the first of the next only an input:

    stream    t0 t1 t2 t3 t4 t5 t6 t7 t8 ...
    window 0  t0 t1 t2 t3 t4                     sequence_length 4
    window 1              t4 t5 t6 t7 t8

Shapes: `B` windows, `S` sequence length.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.raw_streams import RawStreams, fingerprint_of_prefix, open_raw_streams
from cpt.data.shards import Shard, bin_path, idx_path
from cpt.data.token_file import TokenFile

MANIFEST_NAME = "corpus.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION = 1
_BYTES_AT_ONCE = 1 << 18  # read in one piece


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard: its name without extension, counts, sizes in bytes, xxh64 of each file."""

    name: str
    num_tokens: int
    num_documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh64: str
    idx_xxh64: str


@dataclass(frozen=True)
class Manifest:
    """`corpus.json`: how the tokens were made, how many there are, and the shards that hold them.

    num_bytes: UTF-8 bytes of the text, for bits per byte.
    end_of_document, begin_of_document: the token id put after or before each document, None where none was.
    packed_length: the length of the bins that `cpt data pack` put whole documents into, None without packing.
    num_padding: tokens that stand for no text, each a document of its own.
    """

    tokenizer_hash: str
    vocabulary_size: int
    end_of_document: int | None
    begin_of_document: int | None
    num_tokens: int
    num_documents: int
    num_bytes: int
    inputs: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    format_version: int = FORMAT_VERSION
    packed_length: int | None = None
    num_padding: int = 0

    def write(self, folder: Path) -> None:
        """Write `corpus.json` of the corpus in `folder`."""
        (folder / MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a corpus folder; Fault if it cannot be read or does not add up."""
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise Fault(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise Fault(f"{path} is not JSON ({error}); build the corpus again") from error
        if not isinstance(content, dict):
            raise Fault(f"{path} does not hold a manifest; build the corpus again")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise Fault(
                f"{path} has format_version {version!r}; this release reads {FORMAT_VERSION}: build the corpus again"
            )
        shards = tuple(_record(ShardEntry, entry, path) for entry in content.get("shards", ()))
        inputs = tuple(content.get("inputs", ()))
        manifest = _record(cls, {**content, "inputs": inputs, "shards": shards}, path)
        for total in ("num_tokens", "num_documents"):
            if sum(getattr(entry, total) for entry in shards) != getattr(manifest, total):
                raise Fault(f"{path} does not add up: {total} is not the sum over its shards; build the corpus again")
        return manifest


def _record(kind: type, content: dict[str, Any], path: Path) -> Any:
    fields = dataclasses.fields(kind)
    # What has a default was not in the first manifests.
    missing = [field.name for field in fields if field.name not in content and field.default is dataclasses.MISSING]
    if missing:
        raise Fault(f"{path} lacks {', '.join(missing)}; build the corpus again")
    return kind(**{field.name: content[field.name] for field in fields if field.name in content})


class Corpus:
    """The tokens of one corpus as one stream, the shards one after the other; make it with `Corpus.open`.

    Opening looks at the sizes of the files and no further: the time does not grow with the number of tokens. Without
    a manifest `manifest` is None, and so is everything that only a manifest can tell.
    """

    def __init__(
        self, path: Path, prefixes: list[Path], manifest: Manifest | None, raw: RawStreams | None = None
    ) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).name
        self.manifest = manifest
        self._prefixes = prefixes
        self._raw = raw
        self._shards: list[TokenFile | None] = [None] * len(prefixes)
        if manifest is None:
            # The files alone know the counts.
            self._shards = [*raw.files] if raw else [Shard(prefix) for prefix in prefixes]
            shard_tokens = [shard.num_tokens for shard in self._shards]
        else:
            shard_tokens = [entry.num_tokens for entry in manifest.shards]
        self._ends = np.cumsum(np.array(shard_tokens, dtype=np.int64))
        self.num_tokens = int(self._ends[-1]) if shard_tokens else 0

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """The corpus in a folder with corpus.json, or of PREFIX.bin and PREFIX.idx (either file's name will do too).

        Or the files of other programs, as cpt/data/raw_streams.py has their paths. Raises Fault if there is none, if a
        shard is missing, or if one has another size than the manifest says.
        """
        path = Path(path)
        if (path / MANIFEST_NAME).exists():
            manifest = Manifest.read(path)
            faults = [fault for entry in manifest.shards for fault in faults_of_sizes(path, entry)]
            if faults:
                raise Fault([*faults, f"cpt data verify {path} tells more; copy the corpus or build it again"])
            return cls(path, [path / entry.name for entry in manifest.shards], manifest)
        raw = open_raw_streams(path)
        if raw:
            return cls(path, [stream.prefix for stream in raw.files], None, raw)
        prefix = find_prefix(path)
        return cls(prefix, [prefix], None)

    @cached_property
    def num_documents(self) -> int:
        """Counted from the tokens where raw files have an end of document, which takes a while."""
        if self.manifest:
            return self.manifest.num_documents
        return sum(shard.num_documents for shard in self._shards)

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text behind the tokens."""
        return self.manifest.num_bytes if self.manifest else None

    @property
    def packed_length(self) -> int | None:
        """Length of the bins that whole documents were packed into; windows of any other length cut them."""
        return self.manifest.packed_length if self.manifest else None

    @property
    def num_padding(self) -> int:
        """Tokens that stand for no text."""
        return self.manifest.num_padding if self.manifest else 0

    @property
    def num_text_tokens(self) -> int:
        """Tokens without padding: those that `num_bytes` bytes of text became."""
        return self.num_tokens - self.num_padding

    @property
    def vocabulary_size(self) -> int | None:
        """Entries of the tokenizer that made the tokens; every id is below it."""
        return self.manifest.vocabulary_size if self.manifest else None

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the file that decides the tokenizer's ids."""
        return self.manifest.tokenizer_hash if self.manifest else None

    @property
    def end_of_document(self) -> int | None:
        """The token id that ends every document, None if none was appended."""
        if self._raw:
            return self._raw.end_of_document
        return self.manifest.end_of_document if self.manifest else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer's files, as they were when the corpus was built."""
        folder = self.path / TOKENIZER_FOLDER
        return folder if self.manifest and folder.is_dir() else None

    @cached_property
    def fingerprint(self) -> str:
        """A hexadecimal name of the contents: of all shard checksums and the tokenizer.

        For files without a manifest, which have no checksums, of their sizes and of samples all through them.
        """
        if self._raw:
            return self._raw.fingerprint
        if not self.manifest:
            return fingerprint_of_prefix(self.path, [bin_path(self.path)])
        parts = [self.manifest.tokenizer_hash]
        parts += [checksum for entry in self.manifest.shards for checksum in (entry.bin_xxh64, entry.idx_xxh64)]
        return xxhash.xxh64("\n".join(parts).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """How many shards the stream is cut into."""
        return len(self._prefixes)

    def shard(self, index: int) -> TokenFile:
        """One shard, opened when first asked for."""
        shard = self._shards[index]
        if shard is None:
            shard = Shard(self._prefixes[index])
            expected = self.manifest.shards[index].num_tokens
            if shard.num_tokens != expected:
                raise Fault(
                    f"{bin_path(shard.prefix)} holds {shard.num_tokens:,} tokens where {MANIFEST_NAME} tells of "
                    f"{expected:,}; cpt data verify {self.path} tells more; copy the corpus or build it again"
                )
            self._shards[index] = shard
        return shard

    def read(self, start_token: int, stop_token: int) -> np.ndarray:
        """Tokens of the stream from start to before stop, int64, [stop - start]."""
        if not 0 <= start_token <= stop_token <= self.num_tokens:
            raise ValueError(f"tokens {start_token}..{stop_token} are not within the {self.num_tokens} of {self.path}")
        tokens = np.empty(stop_token - start_token, dtype=np.int64)
        position = start_token
        while position < stop_token:
            index = int(np.searchsorted(self._ends, position, side="right"))
            stop = min(stop_token, int(self._ends[index]))
            shard = self.shard(index)
            begin = int(self._ends[index]) - shard.num_tokens
            tokens[position - start_token : stop - start_token] = shard.read(position - begin, stop - begin)
            position = stop
        return tokens

    def num_windows(self, sequence_length: int, offset: int = 0) -> int:
        """Windows that fit into the stream when the first one begins at token `offset`."""
        if sequence_length < 1 or offset < 0:
            raise ValueError(f"no windows of sequence_length {sequence_length} at offset {offset}; at least 1 and 0")
        return max(0, (self.num_tokens - 1 - offset) // sequence_length)

    def windows(self, ids: np.ndarray, sequence_length: int, offset: int = 0) -> np.ndarray:
        """The windows with these numbers, int64 [B, S + 1]; window i begins at token offset + i * S.

        ids: [B], in any order, repeated or not. Raises ValueError for ids outside 0 .. num_windows - 1.
        """
        ids = np.asarray(ids, dtype=np.int64)
        count = self.num_windows(sequence_length, offset)
        if ids.size and not (ids.min() >= 0 and ids.max() < count):
            raise ValueError(
                f"window ids {ids.min()}..{ids.max()} are not all within the {count} windows of {self.path} "
                f"at sequence_length {sequence_length}, offset {offset}"
            )
        windows = np.empty((len(ids), sequence_length + 1), dtype=np.int64)
        self.read_into(windows, offset + ids * sequence_length)
        return windows

    def read_into(
        self,
        tokens: np.ndarray,
        first_tokens: np.ndarray,
        rows: np.ndarray | None = None,
        before_file: Callable[[Path], object] = lambda path: None,
    ) -> None:
        """Write the stretches of the stream that begin at `first_tokens` [n] into `rows` [n] of `tokens` [B, L].

        Without `rows` into all. Nothing as large as the batch is made beside it, and threads go on while a disk is
        slow. `before_file` is told of each file before it is opened or read. Raises ValueError for stretches that are
        not within the stream.
        """
        length = tokens.shape[1]
        self._refuse_outside(first_tokens, length)
        whole, parted = self._by_shard(first_tokens, length)
        for index, at in whole:
            before_file(self._file(index))
            shard = self.shard(index)
            starts = first_tokens[at] - (self._ends[index] - shard.num_tokens)
            into = at if rows is None else rows[at]
            # Some rows at a time: as they are in the file, they then stay in the processor's cache until they are
            # widened. Slicing a row each would spare that step, and takes a third longer.
            number = max(1, _BYTES_AT_ONCE // (length * shard.dtype.itemsize))
            for begin in range(0, len(starts), number):
                part = slice(begin, begin + number)
                tokens[part if isinstance(into, slice) else into[part]] = shard.gather(starts[part], length)
        for stretch, first, last in parted:
            for index in range(first, last + 1):
                before_file(self._file(index))
                self.shard(index)
            start = int(first_tokens[stretch])
            tokens[stretch if rows is None else rows[stretch]] = self.read(start, start + length)

    def _by_shard(
        self, first_tokens: np.ndarray, length: int
    ) -> tuple[list[tuple[int, np.ndarray | slice]], list[tuple[int, int, int]]]:
        """Which stretches lie in one shard, by shard, and which do not: with the first and the last shard of each."""
        if self.num_shards == 1:
            return [(0, slice(None))], []
        first = np.searchsorted(self._ends, first_tokens, side="right")
        last = np.searchsorted(self._ends, first_tokens + (length - 1), side="right")
        is_whole = first == last
        whole = [(i, np.flatnonzero(is_whole & (first == i))) for i in sorted(set(first[is_whole].tolist()))]
        return whole, [(i, int(first[i]), int(last[i])) for i in np.flatnonzero(~is_whole).tolist()]

    def document_starts(self, first_tokens: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of the stretches of the stream that begin at `first_tokens` [B] begin a document, bool [B, L].

        None does where the files do not tell documents apart. Looked up in the indices on the disk, in a time that
        grows with the logarithm of the number of documents. Raises ValueError for stretches that are not within the
        stream.
        """
        first_tokens = np.asarray(first_tokens, dtype=np.int64)
        self._refuse_outside(first_tokens, length)
        is_start = np.zeros((len(first_tokens), length), dtype=bool)
        stop_tokens = first_tokens + length
        first = np.searchsorted(self._ends, first_tokens, side="right")
        last = np.searchsorted(self._ends, stop_tokens - 1, side="right")
        crossed = [range(begin, end + 1) for begin, end in zip(first.tolist(), last.tolist(), strict=True)]
        for index in sorted(set().union(*crossed)):
            shard = self.shard(index)
            begin = int(self._ends[index]) - shard.num_tokens
            rows = np.flatnonzero((first <= index) & (index <= last))
            within = [np.clip(tokens[rows] - begin, 0, shard.num_tokens) for tokens in (first_tokens, stop_tokens)]
            stretches, starts = shard.starts_within(*within)
            is_start[rows[stretches], starts + begin - first_tokens[rows[stretches]]] = True
        return is_start

    def _refuse_outside(self, first_tokens: np.ndarray, length: int) -> None:
        if len(first_tokens) and not (first_tokens.min() >= 0 and first_tokens.max() + length <= self.num_tokens):
            raise ValueError(
                f"{length} tokens from each of {first_tokens.min()}..{first_tokens.max()} on are not all within the "
                f"{self.num_tokens} of {self.path}"
            )

    def _file(self, index: int) -> Path:
        shard = self._shards[index]
        return shard.file if shard else bin_path(self._prefixes[index])


def faults_of_sizes(folder: Path, entry: ShardEntry) -> list[str]:
    """What is wrong with the two files of a shard, judged by their sizes alone."""
    faults = []
    for path, expected in (
        (bin_path(folder / entry.name), entry.bin_bytes),
        (idx_path(folder / entry.name), entry.idx_bytes),
    ):
        if not path.exists():
            faults.append(f"{path} is missing; {folder / MANIFEST_NAME} names it")
        elif path.stat().st_size != expected:
            size = path.stat().st_size
            faults.append(f"{path} has {size:,} bytes where {folder / MANIFEST_NAME} tells of {expected:,}")
    return faults


def find_prefix(path: Path) -> Path:
    """The prefix of a shard without a manifest, given itself or by the name of either file; Fault if there is none."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") and path.is_file() else path
    if idx_path(prefix).exists() or bin_path(prefix).exists():
        return prefix
    if not path.is_dir():
        raise Fault(
            f"there is no corpus at {path}: neither a folder with {MANIFEST_NAME} nor the files "
            f"{path.name}.bin and {path.name}.idx; cpt data build makes one"
        )
    prefixes = sorted(str(file.with_suffix("")) for file in path.glob("*.idx"))
    if prefixes:
        there = ", ".join(prefixes[:3])
        raise Fault(f"{path} has no {MANIFEST_NAME}; for data in Megatron's format name the prefix: {there}")
    raise Fault(f"{path} is no corpus: it has no {MANIFEST_NAME}; cpt data build makes one")
