"""Whether the corpora of a run fit its model and one another, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare.tokenizers import Tokenizer


def open_corpora(
    paths: Mapping[str, Path], vocabulary: int, tokenizer: Path | None = None, within_documents: bool = True
) -> list[Corpus]:
    """The corpora at `paths`, which are named by the setting that names them.

    `tokenizer`: the folder of the one that the model was trained with, where that is known.

    Raises Fault with all that are missing, hold ids beyond the model's `vocabulary`, have another tokenizer, or are
    packed though attention is not `within_documents`: their padding would be trained on.
    """
    faults: list[str] = []
    expected = (Tokenizer.open(tokenizer).hash, tokenizer) if tokenizer else None
    corpora: list[Corpus] = []
    for where, path in paths.items():
        try:
            corpus = Corpus.open(path)
        except Fault as fault:
            faults.extend(f"{where}: {line}" for line in fault.lines)
            continue
        if corpus.vocabulary_size and corpus.vocabulary_size > vocabulary:
            faults.append(
                f"{where}: {path} has token ids up to {corpus.vocabulary_size - 1}, model.vocabulary is {vocabulary}; "
                f"set it to {corpus.vocabulary_size} or more, or build the corpus with the model's tokenizer"
            )
        if corpus.packed_length and not within_documents:
            faults.append(f"{where}: {path} is packed, and its padding is no text; set attention: within_document")
        if corpus.tokenizer_hash:
            expected = expected or (corpus.tokenizer_hash, corpus.path)
            if corpus.tokenizer_hash != expected[0]:
                faults.append(
                    f"{where}: {path} was built with another tokenizer than {expected[1]}; build it with that one"
                )
        corpora.append(corpus)
    if faults:
        raise Fault(faults)
    return corpora


def refuse_strange_ids(corpus: Corpus, first_tokens: np.ndarray, tokens: np.ndarray, vocabulary: int) -> None:
    """Raise Fault for an id in `tokens` [B, L], read from `first_tokens` [B] on, that is not below the vocabulary."""
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocabulary):
        return
    row, column = np.argwhere((tokens < 0) | (tokens >= vocabulary))[0].tolist()
    place = int(first_tokens[row]) + column
    number = int(corpus.read(place, place + 1)[0])
    raise Fault(
        f"{corpus.path}: token {place:,} has the id {number:,}, model.vocabulary is {vocabulary:,}; name the corpus "
        f"that goes with the model; cpt data verify {corpus.path} --vocabulary {vocabulary} reads all of it"
    )
