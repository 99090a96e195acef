"""Looking into a corpus: counts, lengths and sample texts, for the eye."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare.corpora import refuse_folder_of_corpora
from cpt.data.prepare.sound_index import refuse_damaged_index
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.raw_streams import open_raw_streams
from cpt.data.token_file import TokenFile

PERCENTILES = (0, 10, 50, 90, 99, 100)
SAMPLED_TOKENS = 2**24
SAMPLED_LENGTHS = 2**22
SAMPLE_TEXT_TOKENS = 150


@dataclass(frozen=True)
class SampleText:
    """The beginning of one document. is_whole: nothing was cut off. has_end: its last token is the end of document.

    unknown_rate, byte_rate: as of an inspection, over the tokens shown.
    """

    document: int
    num_tokens: int
    text: str
    is_whole: bool
    has_end: bool
    unknown_rate: float | None
    byte_rate: float | None


@dataclass(frozen=True)
class Inspection:
    """What a corpus looks like. Rates are over `sampled_tokens` tokens; None where a manifest or tokenizer is missing.

    length_percentiles: tokens of a document by percentile, padding left out.
    byte_rate: of tokens for a single byte, which text falls back on where there is no piece for a character.
    packed_length, num_padding: as in the manifest.
    """

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int | None
    num_shards: int
    dtype: str
    vocabulary_size: int | None
    length_percentiles: dict[int, int]
    unknown_rate: float | None
    byte_rate: float | None
    end_rate: float | None
    sampled_tokens: int
    samples: tuple[SampleText, ...]
    packed_length: int | None = None
    num_padding: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text for each token that is not padding; None if the bytes are not known."""
        num_tokens = self.num_tokens - self.num_padding
        return self.num_bytes / num_tokens if self.num_bytes is not None and num_tokens else None


def inspect_corpus(path: str | Path, num_samples: int = 3, tokenizer: str | Path | None = None) -> Inspection:
    """Counts, lengths and the beginnings of a few documents, spread over it; reads a bounded part of the tokens.

    tokenizer: of files that do not bring their own. Raises Fault if there is no corpus at path, if its index is
    damaged, or if its tokens are not all of the tokenizer.
    """
    refuse_folder_of_corpora(path)
    corpus = Corpus.open(path)
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    raw = None if corpus.manifest else open_raw_streams(corpus.path)
    refuse_damaged_index([raw.index] if raw and raw.index else shards, corpus.path)
    special = _Special(Tokenizer.open(tokenizer or corpus.tokenizer) if tokenizer or corpus.tokenizer else None)
    lengths = np.concatenate([_some(shard.document_lengths, SAMPLED_LENGTHS // len(shards)) for shard in shards])
    if corpus.packed_length:
        lengths = lengths[lengths > 1]
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest") if lengths.size else np.zeros(len(PERCENTILES))
    sampled = _sampled_tokens(corpus, shards)
    ends = None if corpus.end_of_document is None else sampled == corpus.end_of_document
    return Inspection(
        name=corpus.name,
        num_tokens=corpus.num_tokens,
        num_documents=corpus.num_documents,
        num_bytes=corpus.num_bytes,
        num_shards=corpus.num_shards,
        dtype=", ".join(sorted({shard.dtype.name for shard in shards})),
        vocabulary_size=corpus.vocabulary_size,
        length_percentiles=dict(zip(PERCENTILES, percentiles.astype(int).tolist(), strict=True)),
        unknown_rate=special.unknown_rate(sampled),
        byte_rate=special.byte_rate(sampled),
        end_rate=float(ends.mean()) if ends is not None and sampled.size else None,
        sampled_tokens=sampled.size,
        samples=tuple(_samples(corpus, shards, special, num_samples)) if special.tokenizer else (),
        packed_length=corpus.packed_length,
        num_padding=corpus.num_padding,
    )


def _some(values: np.ndarray, count: int) -> np.ndarray:
    """At most about `count` of the values, evenly spread."""
    return values[:: max(1, len(values) // max(1, count))]


def _sampled_tokens(corpus: Corpus, shards: list[TokenFile]) -> np.ndarray:
    """At most about SAMPLED_TOKENS tokens, from the beginning of each shard."""
    pieces = []
    for shard in shards:
        share = SAMPLED_TOKENS * shard.num_tokens // max(1, corpus.num_tokens)
        pieces.append(shard.read(0, min(shard.num_tokens, max(1, share))))
    return np.concatenate(pieces)


@final
class _Special:
    """How many of some tokens are unknown or single bytes; None where that is not known or there are none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._byte_tokens = tokenizer.byte_tokens if tokenizer else np.empty(0, np.int32)

    def unknown_rate(self, tokens: np.ndarray) -> float | None:
        if not tokens.size or self.tokenizer is None or self.tokenizer.unknown is None:
            return None
        return float((tokens == self.tokenizer.unknown).mean())

    def byte_rate(self, tokens: np.ndarray) -> float | None:
        if not tokens.size or not self._byte_tokens.size:
            return None
        return float(np.isin(tokens, self._byte_tokens).mean())


def _samples(corpus: Corpus, shards: list[TokenFile], special: _Special, count: int) -> Iterator[SampleText]:
    wanted = np.unique(np.linspace(0, corpus.num_documents - 1, count, dtype=np.int64))
    first_document = 0
    for shard in shards:
        for number in wanted[(wanted >= first_document) & (wanted < first_document + shard.num_documents)].tolist():
            if corpus.packed_length:
                number = first_document + _before_padding(shard, number - first_document)
            tokens = shard.document(number - first_document)
            shown = tokens[:SAMPLE_TEXT_TOKENS]
            _refuse_foreign(shown, special.tokenizer, corpus)
            is_whole = shown.size == tokens.size
            has_end = bool(tokens.size and tokens[-1] == corpus.end_of_document)
            text = special.tokenizer.decode(shown[:-1] if is_whole and has_end else shown)
            rates = special.unknown_rate(shown), special.byte_rate(shown)
            yield SampleText(number, tokens.size, text, is_whole, has_end, *rates)
        first_document += shard.num_documents


def _before_padding(shard: TokenFile, number: int) -> int:
    """The last document up to this one that is no padding; padding comes behind the documents of a bin."""
    while number > 0 and shard.document(number).size == 1:
        number -= 1
    return number


def _refuse_foreign(tokens: np.ndarray, tokenizer: Tokenizer, corpus: Corpus) -> None:
    foreign = tokens[(tokens < 0) | (tokens >= tokenizer.vocabulary_size)]
    if foreign.size:
        raise Fault(
            f"{corpus.path} has token id {foreign[0]}, outside the vocabulary of {tokenizer.vocabulary_size:,} of "
            f"{tokenizer.deciding_file}; name the tokenizer that made the ids, or look for damage with cpt data verify"
        )
