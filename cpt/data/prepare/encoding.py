"""Batches of texts to token ids, here or on several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import xxhash

from cpt.config import Fault
from cpt.data.prepare.tokenizers import Tokenizer

# Enough batches under way to keep every worker busy while one long document is waited for.
BATCHES_PER_WORKER = 3


class HasTexts(Protocol):
    """What can be encoded: anything with a list of texts, and of the numbers of the inputs they are from."""

    texts: list[str]
    inputs: list[int]


Batch = TypeVar("Batch", bound=HasTexts)


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to know. Ids of None are not put before or after documents."""

    tokenizer: str
    begin_of_document: int | None
    end_of_document: int | None
    holdout: float
    engine: str = "auto"


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of a batch of documents one after the other, int32, and three lists with an entry a document.

    A document without tokens has 0 of them; nothing is put before or after it.
    """

    tokens: np.ndarray
    num_tokens: list[int]
    num_bytes: list[int]
    is_held_out: list[bool]


class Encoder:
    """Tokenizes batches; every worker process holds one."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer.open(recipe.tokenizer, recipe.engine)
        self._input: int | None = None
        self._before = [] if recipe.begin_of_document is None else [recipe.begin_of_document]
        self._after = [] if recipe.end_of_document is None else [recipe.end_of_document]

    def encode(self, texts: list[str], inputs: list[int]) -> EncodedBatch:
        """The token ids of texts, each with its begin and end, and on which side of the holdout each falls.

        inputs: the number of the input file of each text.
        """
        pieces: list[np.ndarray] = []
        num_tokens, num_bytes, is_held_out = [], [], []
        for text, number in zip(texts, inputs, strict=True):
            if number != self._input:
                self._input = number
                self._tokenizer.begin_input()
            ids = self._tokenizer.encode(text)
            encoded = text.encode()
            num_bytes.append(len(encoded))
            is_held_out.append(xxhash.xxh64_intdigest(encoded) < self._recipe.holdout * 2**64)
            if ids.size == 0:
                num_tokens.append(0)
                continue
            pieces += [np.array(self._before, np.int32), ids, np.array(self._after, np.int32)]
            num_tokens.append(len(self._before) + ids.size + len(self._after))
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return EncodedBatch(tokens, num_tokens, num_bytes, is_held_out)


def encode_batches(batches: Iterable[Batch], recipe: Recipe, workers: int) -> Iterator[tuple[Batch, EncodedBatch]]:
    """The batches, each with its token ids, in order, a bounded number of them under way.

    workers: processes that tokenize; with 1, this one does. Raises Fault if a worker dies.
    """
    if workers == 1:
        encoder = Encoder(recipe)
        for batch in batches:
            yield batch, encoder.encode(batch.texts, batch.inputs)
        return
    # A forked copy of a process with threads (Arrow's, torch's) can hang; a fresh one cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(recipe,))
    under_way: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, pool.submit(_encode_in_worker, batch.texts, batch.inputs)))
            if len(under_way) >= BATCHES_PER_WORKER * workers:
                yield _next_done(under_way)
        while under_way:
            yield _next_done(under_way)
    except BrokenProcessPool as error:
        raise Fault(
            f"one of {workers} worker processes died, most often for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next_done(under_way: deque[tuple[Batch, Future[EncodedBatch]]]) -> tuple[Batch, EncodedBatch]:
    batch, encoded = under_way.popleft()
    return batch, encoded.result()


_encoder_of_this_worker: Encoder | None = None


def _start_worker(recipe: Recipe) -> None:
    global _encoder_of_this_worker
    # Ctrl-C reaches the whole group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder_of_this_worker = Encoder(recipe)


def _end_with_parent() -> None:
    # A parent that was killed cannot end its workers, which would wait for work forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str], inputs: list[int]) -> EncodedBatch:
    return _encoder_of_this_worker.encode(texts, inputs)
