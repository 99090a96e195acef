"""Looking into a corpus: counts, lengths and sample texts, for the eye."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt.data.corpus import Corpus
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import Shard

PERCENTILES = (0, 10, 50, 90, 99, 100)
SAMPLED_TOKENS = 2**24
SAMPLED_LENGTHS = 2**22
SAMPLE_TEXT_TOKENS = 150


@dataclass(frozen=True)
class SampleText:
    """The beginning of one document. is_whole: nothing was cut off. has_end: its last token is the end of document."""

    document: int
    num_tokens: int
    text: str
    is_whole: bool
    has_end: bool


@dataclass(frozen=True)
class Inspection:
    """What a corpus looks like. Rates are over `sampled_tokens` tokens; None where a manifest or tokenizer is missing.

    length_percentiles: tokens of a document by percentile.
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
    end_rate: float | None
    sampled_tokens: int
    samples: tuple[SampleText, ...]

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text for each token; None if the bytes are not known."""
        return self.num_bytes / self.num_tokens if self.num_bytes is not None and self.num_tokens else None


def inspect_corpus(path: str | Path, num_samples: int = 3) -> Inspection:
    """Counts, lengths and the beginnings of a few documents, spread over it; reads a bounded part of the tokens."""
    corpus = Corpus.open(path)
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    tokenizer = Tokenizer.open(corpus.tokenizer) if corpus.tokenizer else None
    lengths = np.concatenate([_some(shard.document_lengths, SAMPLED_LENGTHS // len(shards)) for shard in shards])
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest") if lengths.size else np.zeros(len(PERCENTILES))
    sampled, unknown, ends = _count_special(corpus, shards, tokenizer.unknown if tokenizer else None)
    return Inspection(
        name=corpus.name,
        num_tokens=corpus.num_tokens,
        num_documents=corpus.num_documents,
        num_bytes=corpus.num_bytes,
        num_shards=corpus.num_shards,
        dtype=", ".join(sorted({shard.dtype.name for shard in shards})),
        vocabulary_size=corpus.vocabulary_size,
        length_percentiles=dict(zip(PERCENTILES, percentiles.astype(int).tolist(), strict=True)),
        unknown_rate=unknown / sampled if sampled and tokenizer and tokenizer.unknown is not None else None,
        end_rate=ends / sampled if sampled and corpus.end_of_document is not None else None,
        sampled_tokens=sampled,
        samples=tuple(_samples(corpus, shards, tokenizer, num_samples)) if tokenizer else (),
    )


def _some(values: np.ndarray, count: int) -> np.ndarray:
    """At most about `count` of the values, evenly spread."""
    return values[:: max(1, len(values) // max(1, count))]


def _count_special(corpus: Corpus, shards: list[Shard], unknown: int | None) -> tuple[int, int, int]:
    """Tokens looked at, unknown ones among them, ends of documents among them."""
    counts = np.zeros(3, dtype=np.int64)
    for shard in shards:
        share = SAMPLED_TOKENS * shard.num_tokens // max(1, corpus.num_tokens)
        tokens = shard.read(0, min(shard.num_tokens, max(1, share)) if shard.num_tokens else 0)
        counts += (tokens.size, _count(tokens, unknown), _count(tokens, corpus.end_of_document))
    return tuple(counts.tolist())


def _count(tokens: np.ndarray, token_id: int | None) -> int:
    return 0 if token_id is None else int(np.count_nonzero(tokens == token_id))


def _samples(corpus: Corpus, shards: list[Shard], tokenizer: Tokenizer, count: int) -> Iterator[SampleText]:
    wanted = np.unique(np.linspace(0, corpus.num_documents - 1, count, dtype=np.int64))
    first_document = 0
    for shard in shards:
        for number in wanted[(wanted >= first_document) & (wanted < first_document + shard.num_documents)].tolist():
            tokens = shard.document(number - first_document)
            shown = tokens[:SAMPLE_TEXT_TOKENS]
            is_whole = shown.size == tokens.size
            has_end = bool(tokens.size and tokens[-1] == corpus.end_of_document)
            text = tokenizer.decode(shown[:-1] if is_whole and has_end else shown)
            yield SampleText(number, tokens.size, text, is_whole, has_end)
        first_document += shard.num_documents
