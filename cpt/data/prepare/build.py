"""Text to a corpus: read documents, tokenize them on several processes, write shards and a manifest.

    inputs -> documents -> batches of about 1 MB -> worker processes -> documents of token ids -> shards
                              in order                                      in order

The order of documents is that of the input and the bytes of the corpus are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import xxhash
from tqdm import tqdm

from cpt.config import Fault
from cpt.data.prepare.aside import written_aside
from cpt.data.prepare.corpus_writer import SHARD_TOKENS, CorpusWriter
from cpt.data.prepare.documents import Document, read_documents
from cpt.data.prepare.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2**20
# Enough batches under way to keep every worker busy while one long document is waited for.
BATCHES_PER_WORKER = 3
SECONDS_BETWEEN_LINES = 30.0
NO_TOKENS = "document without tokens"


@dataclass(frozen=True)
class BuildReport:
    """What was built. skipped: documents left out, by cause. held_out: the corpus of held-out documents, if asked for."""

    path: Path
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_shards: int
    skipped: dict[str, int]
    held_out: BuildReport | None = None


@dataclass(frozen=True)
class _Recipe:
    """What a worker needs to know. Ids of None are not put before or after documents."""

    tokenizer: str
    begin_of_document: int | None
    end_of_document: int | None
    holdout: float


@dataclass(frozen=True)
class _EncodedBatch:
    """Token ids of a batch of documents one after the other, int32, and three lists with an entry a document."""

    tokens: np.ndarray
    num_tokens: list[int]
    num_bytes: list[int]
    is_held_out: list[bool]
    num_without_tokens: int


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    workers: int = 1,
    append_eos: bool = True,
    prepend_bos: bool = False,
    holdout: float = 0.0,
    on_error: str = "stop",
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> BuildReport:
    """Builds the corpus `output`, which appears whole or not at all; see `read_documents` for inputs and on_error.

    tokenizer: a folder or file for `Tokenizer.open`; its files are copied into the corpus.
    workers: processes that tokenize; with 1, this one does.
    holdout: this share of documents goes to the corpus OUTPUT-held-out instead. The text of a document decides alone,
        so that it stays on its side when other documents come, go or move.
    progress: a progress bar if standard error is a terminal, else a log line now and then.

    Raises Fault for faulty inputs, an output in use, a tokenizer without the ids asked for, or input without documents.
    """
    if not 0.0 <= holdout < 1.0:
        raise Fault(f"holdout = {holdout} is no share of documents; use 0 for none, or for example 0.05 for 5 %")
    if workers < 1:
        raise Fault(f"workers = {workers}; at least 1 process must tokenize")
    opened = Tokenizer.open(tokenizer)
    recipe = _Recipe(
        str(tokenizer),
        _required(opened.begin_of_document, "bos_token", "without --prepend-bos", tokenizer) if prepend_bos else None,
        _required(opened.end_of_document, "eos_token", "with --no-append-eos", tokenizer) if append_eos else None,
        holdout,
    )
    skipped: Counter[str] = Counter()
    num_without_tokens = 0
    batches = _batches(read_documents(inputs, text_key, on_error, skipped))
    outputs = [Path(output)]
    if holdout:
        outputs.append(Path(f"{Path(output)}-held-out"))
    with contextlib.ExitStack() as stack:
        # Left in reverse: OUTPUT is renamed last, so where it is, all is.
        folders = [stack.enter_context(written_aside(folder)) for folder in outputs]
        writers = [stack.enter_context(CorpusWriter(f, opened.vocabulary_size, shard_tokens)) for f in folders]
        told = stack.enter_context(_Progress(Path(output).name, is_shown=progress))
        for batch in stack.enter_context(contextlib.closing(_encoded(batches, recipe, workers))):
            _write(batch, writers)
            num_without_tokens += batch.num_without_tokens
            told.advance(len(batch.num_tokens), batch.tokens.size, sum(batch.num_bytes))
        _refuse_empty(writers, inputs, holdout)
        for writer in writers:
            writer.finish(
                opened, inputs, end_of_document=recipe.end_of_document, begin_of_document=recipe.begin_of_document
            )
    if num_without_tokens:
        skipped[NO_TOKENS] = num_without_tokens
    return _report(outputs, writers, dict(skipped))


def _report(outputs: list[Path], writers: list[CorpusWriter], skipped: dict[str, int]) -> BuildReport:
    report = None
    for path, writer in reversed(list(zip(outputs, writers, strict=True))):
        counts = (writer.num_documents, writer.num_tokens, writer.num_bytes, writer.num_shards)
        report = BuildReport(path, *counts, skipped, held_out=report)
    return report


def _required(token_id: int | None, name: str, way_out: str, tokenizer: str | Path) -> int:
    if token_id is None:
        raise Fault(
            f"the tokenizer {tokenizer} has no {name}; name one in its tokenizer_config.json, or build {way_out}"
        )
    return token_id


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in order, in lists of about a megabyte."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Encoder:
    """Tokenizes batches; every worker process holds one."""

    def __init__(self, recipe: _Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer.open(recipe.tokenizer)
        self._before = [] if recipe.begin_of_document is None else [recipe.begin_of_document]
        self._after = [] if recipe.end_of_document is None else [recipe.end_of_document]

    def encode(self, texts: list[str]) -> _EncodedBatch:
        pieces: list[np.ndarray] = []
        num_tokens, num_bytes, is_held_out = [], [], []
        for text in texts:
            ids = self._tokenizer.encode(text)
            if ids.size == 0:
                continue
            encoded = text.encode()
            pieces += [np.array(self._before, np.int32), ids, np.array(self._after, np.int32)]
            num_tokens.append(len(self._before) + ids.size + len(self._after))
            num_bytes.append(len(encoded))
            is_held_out.append(xxhash.xxh64_intdigest(encoded) < self._recipe.holdout * 2**64)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return _EncodedBatch(tokens, num_tokens, num_bytes, is_held_out, len(texts) - len(num_tokens))


_encoder_of_this_worker: _Encoder | None = None


def _start_worker(recipe: _Recipe) -> None:
    global _encoder_of_this_worker
    # Ctrl-C reaches the whole group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder_of_this_worker = _Encoder(recipe)


def _end_with_parent() -> None:
    # A parent that was killed cannot end its workers, which would wait for work forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> _EncodedBatch:
    return _encoder_of_this_worker.encode(texts)


def _encoded(batches: Iterator[list[str]], recipe: _Recipe, workers: int) -> Iterator[_EncodedBatch]:
    """The batches encoded, in order, a bounded number of them under way."""
    if workers == 1:
        yield from map(_Encoder(recipe).encode, batches)
        return
    # A forked copy of a process with threads (Arrow's, torch's) can hang; a fresh one cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(recipe,))
    under_way: deque[Future[_EncodedBatch]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) >= BATCHES_PER_WORKER * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise Fault(
            f"one of {workers} worker processes died, most often for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(batch: _EncodedBatch, writers: list[CorpusWriter]) -> None:
    start = 0
    for num_tokens, num_bytes, is_held_out in zip(batch.num_tokens, batch.num_bytes, batch.is_held_out, strict=True):
        writers[is_held_out].add_document(batch.tokens[start : start + num_tokens], num_bytes)
        start += num_tokens


def _refuse_empty(writers: list[CorpusWriter], inputs: Sequence[str | Path], holdout: float) -> None:
    counts = [writer.num_documents for writer in writers]
    if not any(counts):
        raise Fault(f"no document with text in {', '.join(map(str, inputs))}; a corpus is made of text")
    if not all(counts):
        side = "held out" if counts[0] else "left to train on"
        raise Fault(f"of {sum(counts):,} documents, none is {side} at --holdout {holdout:.2%}; use another share")


@final
class _Progress:
    """Tells how far a build is: a bar on a terminal, else a log line now and then."""

    def __init__(self, name: str, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._name = name
        self._bar = tqdm(desc=name, unit="B", unit_scale=True, disable=not (is_shown and sys.stderr.isatty()))
        self._begin = self._last_line = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def advance(self, num_documents: int, num_tokens: int, num_bytes: int) -> None:
        self._documents += num_documents
        self._tokens += num_tokens
        self._bytes += num_bytes
        now = time.monotonic()
        rate = self._tokens / max(now - self._begin, 1e-9)
        self._bar.update(num_bytes)
        self._bar.set_postfix_str(f"{self._documents:,} documents, {rate:,.0f} tokens/s", refresh=False)
        if self._is_shown and self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            documents, tokens = f"{self._documents:,}", f"{self._tokens:,}"
            logger.info("%s: %s documents, %s tokens, %.0f tokens/s", self._name, documents, tokens, rate)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.close()
