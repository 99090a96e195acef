"""The token files of a benchmark: one text, written once, that every reader reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.shards import Shard, ShardWriter

_VOCABULARY = 50_304
_MEAN_DOCUMENT_TOKENS = 1_000


@dataclass(frozen=True)
class Material:
    """One text as a shard, and once more as two shards of half of it each; `end_of_document` ends every document."""

    whole: Path
    halves: tuple[Path, Path]
    end_of_document: int
    sequence_length: int

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, still on the disk."""
        return Shard(self.whole).tokens

    @property
    def samples(self) -> np.ndarray:
        """The text cut into [samples, S + 1] one after the other: for formats that hold samples, not a stream."""
        length = self.sequence_length + 1
        tokens = self.tokens
        return tokens[: len(tokens) // length * length].reshape(-1, length)


def make_material(corpus: Path | None, folder: Path, num_tokens: int, sequence_length: int) -> Material:
    """Shards in `folder` of the first `num_tokens` of a corpus, or of random ones.

    Random text has documents of 1,000 tokens on average, their lengths spread as web text's are. Raises Fault if the
    corpus is too short for the sequence length.
    """
    source = Corpus.open(corpus) if corpus else None
    end = (source.end_of_document or 0) if source else 0
    documents = _documents_of(source) if source else _random_documents()
    is_wide = source is not None and source.shard(0).dtype.itemsize > 2
    vocabulary = 2**31 - 1 if is_wide else _VOCABULARY if source is None else 65_499
    material = Material(folder / "whole", (folder / "left", folder / "right"), end, sequence_length)
    with (
        ShardWriter(material.whole, vocabulary) as whole,
        ShardWriter(material.halves[0], vocabulary) as left,
        ShardWriter(material.halves[1], vocabulary) as right,
    ):
        for document in documents:
            document = document[: num_tokens - whole.num_tokens]
            whole.add_document(document)
            (left if whole.num_tokens <= num_tokens // 2 else right).add_document(document)
            if whole.num_tokens == num_tokens:
                break
        fewest = min(left.num_tokens, right.num_tokens)
    if fewest < 4 * (sequence_length + 1):
        raise Fault(
            f"{corpus or 'the text'} gives {whole.num_tokens:,} tokens, too few to compare at sequence length "
            f"{sequence_length}; raise --tokens, name a longer corpus, or lower --sequence-length"
        )
    return material


def _documents_of(corpus: Corpus) -> Iterator[np.ndarray]:
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        for document in range(shard.num_documents):
            yield shard.document(document)


def _random_documents() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(1)
    while True:
        lengths = np.maximum(1, generator.lognormal(np.log(_MEAN_DOCUMENT_TOKENS) - 0.5, 1.0, 4096)).astype(np.int64)
        tokens = generator.integers(1, 50_000, int(lengths.sum()), dtype=np.uint16)
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            document[-1] = 0
            yield document
