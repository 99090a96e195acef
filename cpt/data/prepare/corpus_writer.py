"""Documents of token ids become a corpus folder: shards that roll over, and the manifest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from cpt.data.corpus import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, ShardEntry
from cpt.data.megatron_index import token_type
from cpt.data.prepare.spool import Spool, SpoolSize
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import ShardWriter, bin_path, idx_path

SHARD_TOKENS = 2**30
RECORD = np.dtype([("num_tokens", "<i8")])
# Python's numbers take five times the memory of numpy's.
DOCUMENTS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Origin:
    """What a manifest tells of where the tokens are from; see `Manifest` for the last four."""

    tokenizer: Tokenizer
    inputs: Sequence[str | Path]
    end_of_document: int | None
    begin_of_document: int | None
    packed_length: int | None = None
    num_padding: int = 0


@dataclass
class CorpusState:
    """How far a corpus is: its counts, the shards that are finished, and what waits for the next one."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0
    shards: list[ShardEntry] = field(default_factory=list)
    waiting: SpoolSize = SpoolSize()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CorpusState:
        """The state that `dataclasses.asdict` gave, out of a journal."""
        shards = [ShardEntry(**entry) for entry in content["shards"]]
        return cls(**{**content, "shards": shards, "waiting": SpoolSize(*content["waiting"])})


@final
class CorpusWriter:
    """Writes the shards of one corpus into its folder; `finish` adds the tokenizer and the manifest.

    folder: made when there is something to put into it. spool: beginning of the names of the files where documents
    wait for their shard. state: where an earlier build stopped; what came after it is thrown away.

    A shard is closed before a document that would take it beyond `shard_tokens`, so only a single document can be
    longer. Memory holds a few bytes a document of one shard, and what was added since `flush`.
    """

    def __init__(
        self,
        folder: Path,
        spool: Path,
        vocabulary_size: int,
        shard_tokens: int = SHARD_TOKENS,
        state: CorpusState | None = None,
    ) -> None:
        self.folder = folder
        self.vocabulary_size = vocabulary_size
        self.obsolete: list[Path] = []
        self._state = state or CorpusState()
        self._spool_prefix = spool
        self._shard_tokens = shard_tokens
        finished = {entry.name for entry in self._state.shards}
        for path in folder.glob("shard-*"):
            if path.stem not in finished:
                path.unlink()
        self._spool = self._open_spool(self._state.waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._state.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return self._state.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text written so far."""
        return self._state.num_bytes

    @property
    def num_shards(self) -> int:
        """Shards so far, the unfinished one included."""
        return len(self._state.shards) + (self._spool.num_documents > 0)

    def add_document(self, token_ids: np.ndarray, num_bytes: int) -> None:
        """Appends one document of token ids [tokens], whose text has num_bytes bytes in UTF-8."""
        if self._spool.num_documents and self._spool.num_tokens + token_ids.size > self._shard_tokens:
            self._close_shard()
        self._spool.add(token_ids, (token_ids.size,))
        self._state.num_tokens += token_ids.size
        self._state.num_documents += 1
        self._state.num_bytes += num_bytes

    def flush(self) -> None:
        """Frees the memory of what was added."""
        self._spool.flush()

    def sync(self) -> CorpusState:
        """Where the corpus is, with all that the state tells of on the disk.

        Once the state is set down, the files in `obsolete` can go; before, a killed build still needs them.
        """
        self._spool.sync()
        return dataclasses.replace(self._state, waiting=self._spool.size)

    def finish(self, origin: Origin) -> Manifest:
        """Closes the last shard, copies the tokenizer's files and writes corpus.json."""
        if self._spool.num_documents:
            self._close_shard()
        self.folder.mkdir(parents=True, exist_ok=True)
        origin.tokenizer.copy_to(self.folder / TOKENIZER_FOLDER)
        manifest = Manifest(
            tokenizer_hash=origin.tokenizer.hash,
            vocabulary_size=self.vocabulary_size,
            end_of_document=origin.end_of_document,
            begin_of_document=origin.begin_of_document,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            inputs=tuple(map(str, origin.inputs)),
            shards=tuple(self._state.shards),
            packed_length=origin.packed_length,
            num_padding=origin.num_padding,
        )
        manifest.write(self.folder)
        for path in (self.folder / MANIFEST_NAME, *(self.folder / TOKENIZER_FOLDER).iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return manifest

    def _open_spool(self, size: SpoolSize) -> Spool:
        # A new name for every shard: until the next checkpoint, a killed build goes on from the files of the last one.
        prefix = Path(f"{self._spool_prefix}-{len(self._state.shards):05d}")
        return Spool(prefix, token_type(self.vocabulary_size), RECORD, size)

    def _close_shard(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tokens, records = self._spool.read()
        start = 0
        with ShardWriter(self.folder / f"shard-{len(self._state.shards):05d}", self.vocabulary_size) as shard:
            for first in range(0, len(records), DOCUMENTS_AT_ONCE):
                for num_tokens in records["num_tokens"][first : first + DOCUMENTS_AT_ONCE].tolist():
                    shard.add_document(tokens[start : start + num_tokens])
                    start += num_tokens
        self._state.shards.append(
            ShardEntry(
                name=shard.prefix.name,
                num_tokens=shard.num_tokens,
                num_documents=shard.num_documents,
                bin_bytes=bin_path(shard.prefix).stat().st_size,
                idx_bytes=idx_path(shard.prefix).stat().st_size,
                bin_xxh64=shard.bin_checksum,
                idx_xxh64=shard.idx_checksum,
            )
        )
        self.obsolete += self._spool.paths
        self._spool = self._open_spool(SpoolSize())
