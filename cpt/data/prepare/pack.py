"""A corpus of whole documents in bins of exactly S tokens, so that no window cuts a document that would fit into one.

    documents  aaaa bbbbbbb cc dddddd        bins of S = 8     cc dddddd | aaaa . . . . | bbbbbbb .
                                             and one token     .

A dot is a padding token, a document of its own: what begins a document is never a target of the one before, so padding
is not trained on. With the padding token at the very end, window i of the stream is bin i and the first token of the
next one. Documents are taken in groups, so that memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.permutation import Permutation
from cpt.data.prepare.aside import written_aside
from cpt.data.prepare.best_fit import best_fit
from cpt.data.prepare.build_progress import BuildProgress
from cpt.data.prepare.corpora import refuse_folder_of_corpora
from cpt.data.prepare.corpus_writer import SHARD_TOKENS, CorpusState, CorpusWriter, Origin
from cpt.data.prepare.sound_index import refuse_damaged_index
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import Shard

DOCUMENTS_IN_GROUP = 2**16
# Token ids kept in memory, in bytes, until they go to their file.
LARGEST_BUFFER = 2**26


@dataclass(frozen=True)
class PackReport:
    """What was packed. num_padding: padding tokens, the one at the end included. num_documents: of the corpus.

    num_cut: documents longer than a bin. num_cut_unpacked: those that windows of this length cut in the corpus as it
    was.
    """

    path: Path
    sequence_length: int
    num_bins: int
    num_tokens: int
    num_padding: int
    num_documents: int
    num_cut: int
    num_cut_unpacked: int


class _Group(NamedTuple):
    """Documents that are packed together: where each begins in the stream and its length in tokens, int64 [documents].

    No document is empty.
    """

    starts: np.ndarray
    lengths: np.ndarray


def pack_corpus(
    path: str | Path,
    sequence_length: int,
    output: str | Path,
    *,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> PackReport:
    """Packs the documents of a corpus into the new corpus `output`, which appears whole or not at all.

    A document of up to `sequence_length` tokens stays whole; of a longer one, pieces of that length are cut off, and
    the rest is packed like a document. The bins of a group are in an order drawn from `seed`, from 0 to before 2 ** 64,
    since packing leaves the full ones first. The same request gives the same bytes.

    Raises Fault for a corpus without a manifest, packed already or with a damaged index, and for an output in use.
    """
    if sequence_length < 2:
        raise Fault(f"sequence_length = {sequence_length}; a bin holds at least 2 tokens, one to learn from another")
    if not 0 <= seed < 2**64:
        raise Fault(f"seed = {seed} is no seed; use a whole number from 0 to before 2 ** 64")
    refuse_folder_of_corpora(path)
    corpus = Corpus.open(path)
    if corpus.manifest is None or corpus.tokenizer is None:
        raise Fault(f"{path} has no manifest with a tokenizer, which packing needs; build it with cpt data build")
    if corpus.packed_length:
        raise Fault(f"{path} is packed already, into bins of {corpus.packed_length:,}; pack the corpus it was made of")
    tokenizer = Tokenizer.open(corpus.tokenizer)
    with written_aside(output) as folder, BuildProgress(Path(output).name, progress) as told:
        packing = _Packing(corpus, tokenizer, sequence_length, folder, shard_tokens)
        for number, group in enumerate(_groups(corpus)):
            packing.add(group, xxhash.xxh64_intdigest(number.to_bytes(8, "little"), seed=seed))
            num_tokens = int(group.lengths.sum())
            told.advance(len(group.starts), num_tokens, num_tokens * corpus.shard(0).dtype.itemsize)
        return packing.finish(Path(output))


def _groups(corpus: Corpus) -> Iterator[_Group]:
    first_token = 0
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        refuse_damaged_index([shard], corpus.path)
        for first in range(0, shard.num_documents, DOCUMENTS_IN_GROUP):
            bounds = _starts(shard, first, min(first + DOCUMENTS_IN_GROUP, shard.num_documents))
            lengths = np.diff(bounds)
            yield _Group(first_token + bounds[:-1][lengths > 0], lengths[lengths > 0])
        first_token += shard.num_tokens


def _starts(shard: Shard, first: int, stop: int) -> np.ndarray:
    """First tokens of the documents from first to before stop, and the end of the last one, int64 [documents + 1]."""
    # All starts at once would take memory that grows with the shard.
    sequences = shard.document_array[first : stop + 1]
    num_sequences = len(shard.sequence_offsets)
    begins = shard.sequence_offsets[np.minimum(sequences, num_sequences - 1)] // shard.dtype.itemsize
    return np.where(sequences < num_sequences, begins, shard.num_tokens)


@final
class _Packing:
    """A packed corpus on its way into a folder."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, folder: Path, shard_tokens: int
    ) -> None:
        self._corpus, self._tokenizer, self._length = corpus, tokenizer, sequence_length
        state = CorpusState(num_bytes=corpus.num_bytes)
        self._writer = CorpusWriter(folder, folder / "spool", corpus.vocabulary_size, shard_tokens, state)
        self._padding = np.array([_padding_token(tokenizer)], dtype=corpus.shard(0).dtype)
        self._num_bins = self._num_padding = self._num_documents = self._num_cut = self._num_cut_unpacked = 0
        self._buffered = 0

    def add(self, group: _Group, key: int) -> None:
        """Packs a group; key: draws the order of its bins."""
        self._num_documents += len(group.starts)
        self._num_cut += int(np.count_nonzero(group.lengths > self._length))
        last_tokens = group.starts + group.lengths - 1
        self._num_cut_unpacked += int(np.count_nonzero(group.starts // self._length != last_tokens // self._length))
        pieces = _cut(group, self._length)
        bins = best_fit(pieces.lengths, self._length)
        for number in Permutation(len(bins), key)(np.arange(len(bins))).tolist() if bins else ():
            self._write(pieces, bins[number])
        self._num_bins += len(bins)

    def _write(self, pieces: _Group, numbers: list[int]) -> None:
        room = self._length
        for number in numbers:
            start, length = int(pieces.starts[number]), int(pieces.lengths[number])
            self._writer.add_document(self._corpus.read(start, start + length).astype(self._padding.dtype), 0)
            room -= length
        self._pad(room)
        self._buffered += self._length * self._padding.itemsize
        if self._buffered >= LARGEST_BUFFER:
            self._writer.flush()
            self._remove_obsolete()
            self._buffered = 0

    def _pad(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._writer.add_document(self._padding, 0)
        self._num_padding += num_tokens

    def _remove_obsolete(self) -> None:
        for path in self._writer.obsolete:
            path.unlink()
        self._writer.obsolete.clear()

    def finish(self, output: Path) -> PackReport:
        """Writes the last token and the manifest."""
        self._pad(1)
        manifest = self._corpus.manifest
        origin = Origin(
            self._tokenizer,
            manifest.inputs,
            manifest.end_of_document,
            manifest.begin_of_document,
            packed_length=self._length,
            num_padding=self._num_padding,
        )
        num_tokens = self._writer.finish(origin).num_tokens
        self._remove_obsolete()
        return PackReport(
            output,
            self._length,
            self._num_bins,
            num_tokens,
            self._num_padding,
            self._num_documents,
            self._num_cut,
            self._num_cut_unpacked,
        )


def _padding_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding, else its end of document, else 0; nothing is learned from it whatever it is."""
    known = (tokenizer.padding, tokenizer.end_of_document)
    return next((token_id for token_id in known if token_id is not None), 0)


def _cut(documents: _Group, length: int) -> _Group:
    """The documents with the longer ones cut: pieces of `length` tokens, and the rest."""
    counts = -(-documents.lengths // length)
    ends = np.cumsum(counts)
    places = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    starts = np.repeat(documents.starts, counts) + places * length
    return _Group(starts, np.minimum(length, np.repeat(documents.lengths, counts) - places * length))
