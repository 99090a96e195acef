"""Text to corpora: read documents, tokenize them on several processes, write shards and manifests.

    inputs -> documents -> batches of about 1 MB -> worker processes -> documents of token ids -> shards
                              in order                                      in order

The order of documents is that of the input, or one drawn from a seed, and the bytes of a corpus are the same for any
number of workers. They also are the same however often the build was killed: now and then, what is done is set down
(`checkpoint.py`) in a folder beside the output (`work_folder.py`), and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import xxhash

from cpt.config import Fault
from cpt.data.megatron_index import token_type
from cpt.data.prepare.build_progress import BuildProgress
from cpt.data.prepare.build_report import BuildReport, report_of
from cpt.data.prepare.checkpoint import Checkpoint
from cpt.data.prepare.corpora import SIDES, Corpora, refuse_empty
from cpt.data.prepare.corpus_writer import SHARD_TOKENS, Origin
from cpt.data.prepare.counted import counted
from cpt.data.prepare.document import Document, Position
from cpt.data.prepare.documents import read_documents
from cpt.data.prepare.encoding import EncodedBatch, Recipe, encode_batches
from cpt.data.prepare.input_files import STANDARD_INPUT, find_files
from cpt.data.prepare.shuffle import Buckets
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.work_folder import WorkFolder, work_folder

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2**20
SECONDS_BETWEEN_CHECKPOINTS = 20.0
# Token ids kept in memory, in bytes, until they go to their files.
LARGEST_BUFFER = 2**26


@dataclass(frozen=True)
class _Batch:
    """Texts, numbers of input files and domains of documents, the position after them, what was skipped, by cause."""

    texts: list[str]
    inputs: list[int]
    domains: list[str]
    end: Position
    skipped: dict[str, int]


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    id_key: str | None = None,
    domain_key: str | None = None,
    workers: int = 1,
    append_eos: bool = True,
    prepend_bos: bool = False,
    holdout: float = 0.0,
    shuffle_seed: int | None = None,
    on_error: str = "stop",
    shard_tokens: int = SHARD_TOKENS,
    restart: bool = False,
    engine: str = "auto",
    progress: bool = False,
) -> BuildReport:
    """Builds the corpus `output`, which appears whole or not at all; see `read_documents` for inputs, keys, on_error.

    A build that was killed or stopped goes on when it is asked for the same again; what it has done is in
    OUTPUT.partial until then. Text from standard input cannot be read again, so that such a build leaves nothing.

    tokenizer: a folder or file for `Tokenizer.open`; its files are copied into the corpus.
    domain_key: builds one corpus a domain, OUTPUT/DOMAIN, each with its own manifest.
    workers: processes that tokenize; with 1, this one does.
    holdout: this share of documents goes to the corpus OUTPUT-held-out instead. The text of a document decides alone,
        so that it stays on its side when other documents come, go or move.
    shuffle_seed: puts the documents in an order drawn from this seed; from 0 to before 2 ** 64.
    restart: throws away what an earlier build left, instead of going on.
    engine: see `Tokenizer.open`; the ids are the same.
    progress: a progress bar if standard error is a terminal, else a log line now and then.

    Raises Fault for faulty inputs, an output in use, a tokenizer without the ids asked for, input without documents,
    another build of the same output at work, or one left that was asked for otherwise; OSError if the disk is full.
    """
    if not 0.0 <= holdout < 1.0:
        raise Fault(f"holdout = {holdout} is no share of documents; use 0 for none, or for example 0.05 for 5 %")
    if workers < 1:
        raise Fault(f"workers = {workers}; at least 1 process must tokenize")
    if shuffle_seed is not None and not 0 <= shuffle_seed < 2**64:
        raise Fault(f"shuffle_documents = {shuffle_seed} is no seed; use a whole number from 0 to before 2 ** 64")
    opened = Tokenizer.open(tokenizer, engine)
    logger.info("tokenizing with %s", opened.engine)
    recipe = Recipe(
        str(tokenizer),
        _required(opened.begin_of_document, "bos_token", "without --prepend-bos", tokenizer) if prepend_bos else None,
        _required(opened.end_of_document, "eos_token", "with --no-append-eos", tokenizer) if append_eos else None,
        holdout,
        engine,
    )
    files = find_files(inputs)
    is_resumable = STANDARD_INPUT not in files
    # All that decides the bytes; the number of workers does not.
    options: dict[str, Any] = {
        "inputs": list(map(str, inputs)),
        "tokenizer": {file.name: xxhash.xxh64(file.read_bytes()).hexdigest() for file in opened.files},
        "text_key": text_key,
        "id_key": id_key,
        "domain_key": domain_key,
        "append_eos": append_eos,
        "prepend_bos": prepend_bos,
        "holdout": holdout,
        "shuffle_documents": shuffle_seed,
        "on_error": on_error,
        "shard_tokens": shard_tokens,
    }
    outputs = {Path(f"{Path(output)}{ending}"): side for side, ending in SIDES.items() if holdout or not ending}
    folder = work_folder(list(outputs), options, files, is_resumable=is_resumable, is_restarted=restart)
    with folder as work:
        checkpoint = Checkpoint() if work.journal is None else Checkpoint.from_json(work.journal)
        if checkpoint.num_documents:
            logger.info("going on after %s, from %s", counted(checkpoint.num_documents, "document"), work.path)
        elif not is_resumable:
            logger.info("text from standard input cannot be read again; if it is stopped, this build begins anew")
        corpora = Corpora(
            work.path,
            opened.vocabulary_size,
            has_domains=domain_key is not None,
            shard_tokens=shard_tokens,
            states=checkpoint.corpora,
        )
        buckets = None
        if shuffle_seed is not None:
            kind = token_type(opened.vocabulary_size)
            buckets = Buckets(work.path / "buckets", shuffle_seed, kind, checkpoint.buckets)
        build = _Build(work, corpora, buckets, checkpoint, is_resumable)
        if not checkpoint.is_read:
            skipped = Counter(checkpoint.skipped)
            keys = {"id_key": id_key, "domain_key": domain_key}
            documents = read_documents(inputs, text_key, on_error, skipped, **keys, start=checkpoint.position)
            done = (checkpoint.num_documents, checkpoint.num_bytes)
            with contextlib.ExitStack() as stack:
                told = stack.enter_context(BuildProgress(Path(output).name, progress, done))
                encoded = encode_batches(_batches(documents, skipped), recipe, workers)
                build.read(stack.enter_context(contextlib.closing(encoded)), told)
            checkpoint.skipped = dict(skipped)
            checkpoint.is_read = True
        build.merge()
        if not checkpoint.is_finished:
            refuse_empty(corpora, inputs, holdout)
            build.write_checkpoint()
            corpora.finish(Origin(opened, inputs, recipe.end_of_document, recipe.begin_of_document))
            checkpoint.is_finished = True
            build.write_checkpoint()
        report = report_of(outputs, corpora, checkpoint, domain_key is not None)
        # OUTPUT is renamed last, so where it is, all is.
        work.publish({work.path / side: path for path, side in reversed(outputs.items())})
    return report


def _required(token_id: int | None, name: str, way_out: str, tokenizer: str | Path) -> int:
    if token_id is None:
        raise Fault(
            f"the tokenizer {tokenizer} has no {name}; name one in its tokenizer_config.json, or build {way_out}"
        )
    return token_id


def _batches(documents: Iterable[Document], skipped: Counter[str]) -> Iterator[_Batch]:
    """Documents in order, in batches of about a megabyte of text."""
    texts: list[str] = []
    inputs: list[int] = []
    domains: list[str] = []
    characters = 0
    end = Position()
    for document in documents:
        texts.append(document.text)
        inputs.append(document.end.file)
        domains.append(document.domain)
        end = document.end
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield _Batch(texts, inputs, domains, end, dict(skipped))
            texts, inputs, domains, characters = [], [], [], 0
    if texts:
        yield _Batch(texts, inputs, domains, end, dict(skipped))


@final
class _Build:
    """The state of a build: documents go to the corpora, or first to the buckets of a shuffle."""

    def __init__(
        self,
        work: WorkFolder,
        corpora: Corpora,
        buckets: Buckets | None,
        checkpoint: Checkpoint,
        is_resumable: bool,
    ) -> None:
        self._work = work
        self._corpora = corpora
        self._buckets = buckets
        self._checkpoint = checkpoint
        self._is_resumable = is_resumable
        self._buffered = 0
        self._last_checkpoint = time.monotonic()

    def read(self, encoded: Iterable[tuple[_Batch, EncodedBatch]], told: BuildProgress) -> None:
        """Takes in documents until there are no more."""
        for batch, tokens in encoded:
            self._take(batch, tokens)
            told.advance(len(batch.texts), tokens.tokens.size, sum(tokens.num_bytes))
            self._checkpoint.position = batch.end
            self._checkpoint.skipped = batch.skipped
            self._after_writing()

    def _take(self, batch: _Batch, encoded: EncodedBatch) -> None:
        start = 0
        done = self._checkpoint
        rows = zip(batch.domains, encoded.num_tokens, encoded.num_bytes, encoded.is_held_out, strict=True)
        for domain, num_tokens, num_bytes, is_held_out in rows:
            if num_tokens == 0:
                done.num_without_tokens += 1
                continue
            corpus = self._corpora.number(domain, is_held_out)
            tokens = encoded.tokens[start : start + num_tokens]
            if self._buckets is None:
                self._corpora.add_document(corpus, tokens, num_bytes)
            else:
                self._buckets.add_document(done.num_documents, corpus, tokens, num_bytes)
            done.num_documents += 1
            done.num_bytes += num_bytes
            start += num_tokens
        self._buffered += encoded.tokens.nbytes

    def merge(self) -> None:
        """Takes the documents of a shuffle out of the buckets, in the order of their keys."""
        done = self._checkpoint
        if self._buckets is None or done.num_merged == len(self._buckets):
            return
        logger.info("writing %s in a new order", counted(done.num_documents, "document"))
        self.write_checkpoint()
        for bucket in range(done.num_merged, len(self._buckets)):
            for corpus, tokens, num_bytes in self._buckets.documents(bucket):
                self._corpora.add_document(corpus, tokens, num_bytes)
                self._buffered += tokens.nbytes
            done.num_merged = bucket + 1
            self._after_writing()

    def _after_writing(self) -> None:
        is_time = time.monotonic() - self._last_checkpoint >= SECONDS_BETWEEN_CHECKPOINTS
        # A shard that is finished takes twice its place until the next checkpoint.
        if is_time or self._corpora.has_obsolete():
            self.write_checkpoint()
        elif self._buffered >= LARGEST_BUFFER:
            self._corpora.flush()
            if self._buckets is not None:
                self._buckets.flush()
            self._buffered = 0

    def write_checkpoint(self) -> None:
        """Sets down what is done, and removes what only the last checkpoint needed."""
        done = self._checkpoint
        done.corpora = self._corpora.sync()
        if self._buckets is not None:
            done.buckets = [(0, 0)] * done.num_merged + self._buckets.sync()[done.num_merged :]
        if self._is_resumable:
            self._work.write_checkpoint(done.to_json())
        obsolete = self._corpora.take_obsolete()
        if self._buckets is not None:
            obsolete += [path for bucket in range(done.num_merged) for path in self._buckets.paths(bucket)]
        for path in obsolete:
            path.unlink(missing_ok=True)
        self._buffered = 0
        self._last_checkpoint = time.monotonic()
