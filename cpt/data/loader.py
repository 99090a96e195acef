"""From slots to tokens: this rank's windows of a step, read out of the mapped shards ahead of the step.

    batch(slots) <--- ready ---+
         |                     |
         +-- the slots after these, and after those --> workers: order --> places --> tokens of the map, int32

What comes is a function of the slots alone; reading ahead only decides when it is read. Letters: B windows of this
rank, S sequence length.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from cpt.data.check import refuse_strange_ids
from cpt.data.order import StageOrder, Windows
from cpt.data.stalls import StallWatch

# Places are drawn for so many slots at once: numpy's fixed costs would be twice the reading at 64 windows a step.
_SLOTS_AT_ONCE = 8192


@dataclass(frozen=True)
class Settings:
    """How batches are read, never which: any values give the same batches.

    `prefetch`: batches that are read ahead of the step; 0 reads each when it is asked for. `workers`: threads that read
    ahead, on each rank. `stall_seconds`: after waiting so long for data, the log says for which file, and again
    whenever the wait has doubled.
    """

    prefetch: int = 2
    workers: int = 1
    stall_seconds: float = 30.0

    def faults(self) -> list[str]:
        """Counts below what can be."""
        faults = [] if self.prefetch >= 0 else [f"prefetch = {self.prefetch}: at least 0"]
        if self.workers < 1:
            faults.append(f"workers = {self.workers}: at least 1; prefetch: 0 reads without any")
        if self.stall_seconds <= 0:
            faults.append(f"stall_seconds = {self.stall_seconds:g}: above 0")
        return faults


@dataclass(frozen=True)
class Batch:
    """A step's windows: `tokens` [B, S + 1] and `sources` [B] of this rank; `windows` of the whole step, all ranks.

    `starts` [B, S + 1] is true where a document begins; None if attention and loss run across documents.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    windows: Windows
    starts: torch.Tensor | None = None


@dataclass(eq=False)
class _Request:
    """Slots whose batch is asked for, and what is being done about it."""

    first_slot: int
    num_slots: int
    batch: Future[Batch] | None = None  # None: read by whoever asks
    file: Path | None = None  # being read now

    def is_for(self, first_slot: int, num_slots: int) -> bool:
        return (self.first_slot, self.num_slots) == (first_slot, num_slots)

    def __str__(self) -> str:
        doing = f"reading {self.file}" if self.file else "drawing their windows"
        return f"slots {self.first_slot} to {self.first_slot + self.num_slots - 1}, {doing}"


class Loader:
    """Reads the windows of one data rank out of `num_ranks`; every rank knows the whole step's order.

    `num_slots_in_stage`: where the stage ends. Up to there batches are read ahead, without it none are.
    `within_documents`: tell where documents begin. `pin`: into page-locked memory, for copies to a GPU that do not
    wait. `vocabulary`: a batch with another id than 0 .. vocabulary - 1 is a Fault. Use it as a context manager, or
    close it: its threads end then.
    """

    def __init__(
        self,
        order: StageOrder,
        rank: int,
        num_ranks: int,
        settings: Settings | None = None,
        within_documents: bool = False,
        pin: bool = False,
        num_slots_in_stage: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        settings = settings or Settings()
        self._reader = _Reader(order, rank, num_ranks, within_documents, pin, num_slots_in_stage, vocabulary)
        self._end = num_slots_in_stage
        self._prefetch = settings.prefetch if num_slots_in_stage is not None else 0
        self._num_workers = settings.workers if self._prefetch else 0
        self._threads: list[threading.Thread] = []
        self._asked: SimpleQueue[_Request | None] = SimpleQueue()
        self._ahead: deque[_Request] = deque()
        self._stalls = StallWatch(settings.stall_seconds)
        # Threads know the queue and the reader, not this object: one that was never closed takes them along.
        self._dismiss = weakref.finalize(self, _dismiss, self._asked, self._num_workers)

    def batch(self, first_slot: int, num_slots: int) -> Batch:
        """The batch of the step that trains on `num_slots` slots from `first_slot` on.

        The next one is expected to go on from there with as many slots; any other is read when it is asked for.
        An error of a thread that read ahead is raised here. Raises ValueError beyond the end of the stage.
        """
        if self._end is not None and first_slot + num_slots > self._end:
            raise ValueError(f"slots up to {first_slot + num_slots} of a stage of {self._end}")
        if not self._dismiss.alive:
            raise ValueError("this loader is closed")
        request = self._ahead.popleft() if self._ahead else None
        is_expected = request is not None and request.is_for(first_slot, num_slots)
        if not is_expected:
            _cancel([request, *self._ahead])
            self._ahead.clear()
            request = _Request(first_slot, num_slots)
        self._read_ahead(request)
        self._stalls.begin(lambda: str(request if request in self._reader.at_work else self._in_the_way()))
        try:
            return request.batch.result() if is_expected else self._reader.read(request)
        finally:
            self._stalls.end()

    def close(self) -> None:
        """Ends the threads; one that hangs on a dead disk is left behind and keeps nothing from ending."""
        _cancel(self._ahead)
        self._ahead.clear()
        self._dismiss()
        self._stalls.close()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _in_the_way(self) -> str:
        """What the threads are doing instead of reading what is waited for."""
        return "; ".join(map(str, self._reader.at_work)) or "no thread has begun to read"

    def _read_ahead(self, request: _Request) -> None:
        """Ask for the batches that are expected after `request` and all that were asked for since."""
        while len(self._ahead) < self._prefetch:
            last = self._ahead[-1] if self._ahead else request
            first_slot = last.first_slot + last.num_slots
            if first_slot + request.num_slots > self._end:
                break
            self._ahead.append(_Request(first_slot, request.num_slots, Future()))
            self._asked.put(self._ahead[-1])
        while self._ahead and len(self._threads) < self._num_workers:
            name = f"reader {len(self._threads)}"
            self._threads.append(
                threading.Thread(target=_work, args=(self._asked, self._reader), name=name, daemon=True)
            )
            self._threads[-1].start()


def _work(asked: SimpleQueue[_Request | None], reader: _Reader) -> None:
    while (request := asked.get()) is not None:
        if not request.batch.set_running_or_notify_cancel():
            continue
        try:
            request.batch.set_result(reader.read(request))
        except BaseException as error:  # raised again where the batch is asked for
            request.batch.set_exception(error)
        del request  # a batch must not live on while the thread waits


def _cancel(requests: list[_Request | None] | deque[_Request]) -> None:
    for request in requests:
        if request is not None:
            request.batch.cancel()


def _dismiss(asked: SimpleQueue[_Request | None], num_workers: int) -> None:
    for _ in range(num_workers):
        asked.put(None)


class _Reader:
    """What the threads share: makes the batch of a request."""

    def __init__(
        self,
        order: StageOrder,
        rank: int,
        num_ranks: int,
        within_documents: bool,
        pin: bool,
        end: int | None,
        vocabulary: int | None,
    ) -> None:
        self._order, self._rank, self._num_ranks = order, rank, num_ranks
        self._within_documents, self._pin = within_documents, pin
        self._end, self._vocabulary = end, vocabulary
        self.at_work: list[_Request] = []
        self._lock = threading.Lock()
        self._drawn_from = 0
        self._drawn = Windows(np.empty(0, np.int64), np.empty(0, np.int64))

    def read(self, request: _Request) -> Batch:
        """The batch; meanwhile `request.file` says what is being read, and `at_work` which requests are."""
        self.at_work.append(request)
        try:
            return self._read(request)
        finally:
            self.at_work.remove(request)

    def _read(self, request: _Request) -> Batch:
        def tell(file: Path) -> None:
            request.file = file

        windows = self._windows(request.first_slot, request.num_slots)
        number = request.num_slots // self._num_ranks
        mine = slice(self._rank * number, (self._rank + 1) * number)
        stream, first_token = windows.stream[mine], windows.first_token[mine]
        shape = (number, self._order.sequence_length + 1)
        tokens = torch.empty(shape, dtype=torch.int32, pin_memory=self._pin)  # half of int64 to write and to send
        read_windows(self._order, stream, first_token, tokens.numpy(), tell)
        if self._vocabulary is not None:
            self._refuse_strange_ids(stream, first_token, tokens.numpy(), self._vocabulary)
        starts = None
        if self._within_documents:
            starts = torch.empty(shape, dtype=torch.bool, pin_memory=self._pin)
            _read_starts(self._order, stream, first_token, starts.numpy(), tell)
        return Batch(tokens, torch.from_numpy(stream), windows, starts)

    def _refuse_strange_ids(
        self, stream: np.ndarray, first_token: np.ndarray, tokens: np.ndarray, vocabulary: int
    ) -> None:
        """Raise Fault for ids that the model has not; only what we built ourselves is known to have none."""
        for index, rows in _rows_by_source(stream):
            corpus, rows = self._order.corpora[index], slice(None) if rows is None else rows
            if corpus.vocabulary_size is None:
                refuse_strange_ids(corpus, first_token[rows], tokens[rows], vocabulary)

    def _windows(self, first_slot: int, num_slots: int) -> Windows:
        with self._lock:
            begin = first_slot - self._drawn_from
            if begin < 0 or begin + num_slots > len(self._drawn.stream):
                left = 0 if self._end is None else min(_SLOTS_AT_ONCE, self._end - first_slot)
                self._drawn = self._order.windows(first_slot, max(num_slots, left))
                self._drawn_from, begin = first_slot, 0
            part = slice(begin, begin + num_slots)
            return Windows(self._drawn.stream[part], self._drawn.first_token[part])


def read_windows(
    order: StageOrder,
    stream: np.ndarray,
    first_token: np.ndarray,
    tokens: np.ndarray,
    before_file: Callable[[Path], object] = lambda path: None,
) -> None:
    """Write the windows that begin at `first_token` [B] of the sources `stream` [B] into `tokens` [B, S + 1] int32.

    `before_file` is told of each file before it is opened or read.
    """
    corpora = order.corpora
    for index, rows in _rows_by_source(stream):
        corpora[index].read_into(tokens, first_token if rows is None else first_token[rows], rows, before_file)


def _read_starts(
    order: StageOrder,
    stream: np.ndarray,
    first_token: np.ndarray,
    starts: np.ndarray,
    before_file: Callable[[Path], object],
) -> None:
    """Write into `starts` [B, S + 1] where documents begin in the windows that `read_windows` reads."""
    corpora = order.corpora
    for index, rows in _rows_by_source(stream):
        before_file(corpora[index].path)
        rows = slice(None) if rows is None else rows
        starts[rows] = corpora[index].document_starts(first_token[rows], starts.shape[1])


def _rows_by_source(stream: np.ndarray) -> list[tuple[int, np.ndarray | None]]:
    """The rows of each source; None for all of them."""
    sources = sorted(set(stream.tolist()))
    return [(index, None if len(sources) == 1 else np.flatnonzero(stream == index)) for index in sources]
