"""Documents of token ids become a corpus folder: shards that roll over, and the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np

from cpt.data.corpus import TOKENIZER_FOLDER, Manifest, ShardEntry
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import ShardWriter, bin_path, idx_path

SHARD_TOKENS = 2**30


@final
class CorpusWriter:
    """Writes the shards of one corpus into an existing folder; `finish` adds the tokenizer and the manifest.

    A shard is closed before a document that would take it beyond `shard_tokens`, so only a single document can be
    longer. Use it as a context manager: leaving the block by an exception removes the shard being written.
    """

    def __init__(self, folder: Path, vocabulary_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.vocabulary_size = vocabulary_size
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._shard_tokens = shard_tokens
        self._shard: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    @property
    def num_shards(self) -> int:
        return len(self._entries) + (self._shard is not None)

    def add_document(self, token_ids: np.ndarray, num_bytes: int) -> None:
        """Appends one document of token ids [tokens], whose text has num_bytes bytes in UTF-8."""
        if self._shard is not None and self._shard.num_tokens + token_ids.size > self._shard_tokens:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardWriter(self.folder / f"shard-{len(self._entries):05d}", self.vocabulary_size)
        self._shard.add_document(token_ids)
        self.num_tokens += token_ids.size
        self.num_documents += 1
        self.num_bytes += num_bytes

    def finish(
        self,
        tokenizer: Tokenizer,
        inputs: Sequence[str | Path],
        *,
        end_of_document: int | None,
        begin_of_document: int | None,
    ) -> Manifest:
        """Closes the last shard, copies the tokenizer's files and writes corpus.json."""
        if self._shard is not None:
            self._close_shard()
        tokenizer.copy_to(self.folder / TOKENIZER_FOLDER)
        manifest = Manifest(
            tokenizer_hash=tokenizer.hash,
            vocabulary_size=self.vocabulary_size,
            end_of_document=end_of_document,
            begin_of_document=begin_of_document,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            inputs=tuple(map(str, inputs)),
            shards=tuple(self._entries),
        )
        manifest.write(self.folder)
        return manifest

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        with shard:
            pass
        self._entries.append(
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

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.discard()
