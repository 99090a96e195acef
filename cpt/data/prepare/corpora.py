"""All corpora of one build: one, or one a domain, each with a held-out part if a share is held out."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from cpt.config import Fault
from cpt.data.corpus import MANIFEST_NAME
from cpt.data.prepare.corpus_writer import SHARD_TOKENS, CorpusState, CorpusWriter, Origin
from cpt.data.prepare.counted import counted
from cpt.data.shards import bin_path, idx_path

logger = logging.getLogger(__name__)

# The two sides of a build: folders of the work folder, and what comes after OUTPUT in the names they get.
SIDES = {"corpus": "", "held-out": "-held-out"}
SPOOLS = "spools"
MOST_DOMAINS = 1000
LONGEST_FOLDER_NAME = 100
NAMES_TOLD = 10


@dataclass(frozen=True)
class _Corpus:
    domain: str
    is_held_out: bool
    writer: CorpusWriter


@final
class Corpora:
    """The corpora of a build in a work folder, numbered in the order in which their first documents come.

    has_domains: each domain is a folder of its own within its side. states: where an earlier build stopped.
    """

    def __init__(
        self,
        work: Path,
        vocabulary_size: int,
        *,
        has_domains: bool = False,
        shard_tokens: int = SHARD_TOKENS,
        states: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._work = work
        self._vocabulary_size = vocabulary_size
        self._has_domains = has_domains
        self._shard_tokens = shard_tokens
        self._corpora: list[_Corpus] = []
        self._numbers: dict[tuple[str, bool], int] = {}
        self._domains: dict[str, str] = {}
        (work / SPOOLS).mkdir(exist_ok=True)
        for content in states:
            self._open(content["domain"], content["is_held_out"], CorpusState.from_json(content["state"]))

    def number(self, domain: str, is_held_out: bool) -> int:
        """The number of the corpus of these documents, which is begun if there is none yet."""
        if (domain, is_held_out) not in self._numbers:
            self._open(domain, is_held_out, None)
        return self._numbers[domain, is_held_out]

    def add_document(self, number: int, token_ids: np.ndarray, num_bytes: int) -> None:
        """Appends a document of token ids [tokens] to the corpus of this number."""
        self._corpora[number].writer.add_document(token_ids, num_bytes)

    def flush(self) -> None:
        """Frees the memory of what was added."""
        for corpus in self._corpora:
            corpus.writer.flush()

    def sync(self) -> list[dict[str, Any]]:
        """Where all corpora are, as JSON holds it, with all that it tells of on the disk."""
        return [
            {
                "domain": corpus.domain,
                "is_held_out": corpus.is_held_out,
                "state": dataclasses.asdict(corpus.writer.sync()),
            }
            for corpus in self._corpora
        ]

    def take_obsolete(self) -> list[Path]:
        """Files that nothing needs once the last state is set down."""
        files = [path for corpus in self._corpora for path in corpus.writer.obsolete]
        for corpus in self._corpora:
            corpus.writer.obsolete.clear()
        return files

    def has_obsolete(self) -> bool:
        """Whether a shard was finished since the last `take_obsolete`."""
        return any(corpus.writer.obsolete for corpus in self._corpora)

    def writers(self, is_held_out: bool) -> dict[str, CorpusWriter]:
        """The corpora of one side by domain, sorted; without domains, the only one is called ""."""
        found = {corpus.domain: corpus.writer for corpus in self._corpora if corpus.is_held_out == is_held_out}
        return dict(sorted(found.items()))

    def finish(self, origin: Origin) -> None:
        """Closes the last shards and writes the manifests."""
        for corpus in self._corpora:
            corpus.writer.finish(origin)

    def _open(self, domain: str, is_held_out: bool, state: CorpusState | None) -> None:
        folder = self._work / list(SIDES)[is_held_out]
        if self._has_domains:
            folder /= self._claim_folder(domain)
        number = len(self._corpora)
        writer = CorpusWriter(
            folder, self._work / SPOOLS / f"corpus-{number:05d}", self._vocabulary_size, self._shard_tokens, state
        )
        self._corpora.append(_Corpus(domain, is_held_out, writer))
        self._numbers[domain, is_held_out] = number

    def _claim_folder(self, domain: str) -> str:
        name = folder_of_domain(domain)
        # Some file systems take no notice of capitals.
        owner = self._domains.setdefault(name.lower(), domain)
        if owner != domain:
            raise Fault(
                f"the domains {owner!r} and {domain!r} would both go to the folder {name}; rename one in the input"
            )
        if len(self._domains) > MOST_DOMAINS:
            raise Fault(
                f"more than {MOST_DOMAINS:,} domains, {domain!r} the last; --domain-key is for a key with few values"
            )
        return name


def refuse_empty(corpora: Corpora, inputs: Sequence[str | Path], holdout: float) -> None:
    """Raises Fault if no document came to the corpora, or none to a side of them; warns of domains of one side only."""
    counts = [sum(writer.num_documents for writer in corpora.writers(side).values()) for side in (False, True)]
    if not any(counts):
        raise Fault(f"no document with text in {', '.join(map(str, inputs))}; a corpus is made of text")
    if holdout and not all(counts):
        side = "held out" if counts[0] else "left to train on"
        raise Fault(
            f"of {counted(sum(counts), 'document')}, none is {side} at --holdout {holdout:.2%}; use another share"
        )
    for is_held_out in (False, True) if holdout else ():
        lacking = set(corpora.writers(not is_held_out)) - set(corpora.writers(is_held_out))
        if lacking:
            side = "held out" if is_held_out else "left to train on"
            logger.warning("no document is %s of: %s", side, ", ".join(sorted(lacking)))


def refuse_folder_of_corpora(path: str | Path) -> None:
    """Raises Fault, naming some, if `path` only holds corpora, as the folder of a build with a key of the domain does.

    A path that names anything else is passed over.
    """
    path = Path(path)
    if any(file.exists() for file in (path / MANIFEST_NAME, bin_path(path), idx_path(path))):
        return
    names = sorted(manifest.parent.name for manifest in path.glob(f"*/{MANIFEST_NAME}"))
    if names:
        more = f" and {len(names) - NAMES_TOLD:,} more" if len(names) > NAMES_TOLD else ""
        raise Fault(
            f"{path} is no corpus but holds some: {', '.join(names[:NAMES_TOLD])}{more}; name one of them, such as "
            f"{path / names[0]}"
        )


def folder_of_domain(domain: str) -> str:
    """The name of the folder of a domain: letters, digits and ._+- are kept, and a - stands for all between them.

    Raises Fault for a domain of which nothing would be left.
    """
    name = re.sub(r"[^\w.+-]+", "-", domain).strip("-.")[:LONGEST_FOLDER_NAME]
    if not name:
        raise Fault(f"the domain {domain!r} gives no name for a folder; give it one with letters or digits")
    return name
