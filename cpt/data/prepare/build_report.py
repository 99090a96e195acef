"""What a build made: documents, tokens, bytes, and what it left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt.data.prepare.checkpoint import Checkpoint
from cpt.data.prepare.corpora import SIDES, Corpora
from cpt.data.prepare.corpus_writer import CorpusWriter

NO_TOKENS = "document without tokens"


@dataclass(frozen=True)
class BuildReport:
    """What was built. skipped: documents left out, by cause. held_out: the corpora of held-out documents, if asked for.

    domains: with a key of the domain, one report a corpus, sorted; path and counts are then those of all together.
    """

    path: Path
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_shards: int
    skipped: dict[str, int]
    held_out: BuildReport | None = None
    domains: tuple[BuildReport, ...] = ()


def report_of(outputs: dict[Path, str], corpora: Corpora, checkpoint: Checkpoint, has_domains: bool) -> BuildReport:
    """The report of a build whose corpora are whole; outputs: each with the side that it is."""
    skipped = dict(checkpoint.skipped)
    if checkpoint.num_without_tokens:
        skipped[NO_TOKENS] = checkpoint.num_without_tokens
    report = None
    for path, side in reversed(outputs.items()):
        writers = corpora.writers(is_held_out=bool(SIDES[side]))
        domains = []
        if has_domains:
            domains = [BuildReport(path / w.folder.name, *_counts([w]), skipped) for w in writers.values()]
        counts = _counts(list(writers.values()))
        report = BuildReport(path, *counts, skipped, held_out=report, domains=tuple(domains))
    return report


def _counts(writers: list[CorpusWriter]) -> tuple[int, int, int, int]:
    names = ("num_documents", "num_tokens", "num_bytes", "num_shards")
    documents, tokens, num_bytes, shards = (sum(getattr(writer, name) for writer in writers) for name in names)
    return documents, tokens, num_bytes, shards
