"""Whether the corpora of a run fit its model and one another, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cpt.config import Fault
from cpt.data.corpus import Corpus


def open_corpora(paths: Mapping[str, Path], vocabulary: int) -> list[Corpus]:
    """The corpora at `paths`, which are named by the setting that names them.

    Raises Fault with all that are missing, hold ids beyond the model's `vocabulary`, or have another tokenizer.
    """
    faults: list[str] = []
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
        known = next((c for c in corpora if c.tokenizer_hash), None)
        if known and corpus.tokenizer_hash and corpus.tokenizer_hash != known.tokenizer_hash:
            faults.append(f"{where}: {path} was built with another tokenizer than {known.path}; build both with one")
        corpora.append(corpus)
    if faults:
        raise Fault(faults)
    return corpora
