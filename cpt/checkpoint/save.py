"""Who waits for whom while a checkpoint is written, in the background or not.

    begin   all ranks: is there room? the first makes the folder aside; each copies its pieces into host memory
    thread  each rank's own: writes its file and its part of the index
    poll    all ranks, once a step: has everybody written? Then the first rank's thread joins the parts, renames,
            and does what follows. Has somebody failed? Then the folder aside goes, and all are told
    wait    poll until it has ended

A thread never talks to other ranks: two conversations at once would be mixed up.
"""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpt.checkpoint.write import Content, Part, aside_of, join_parts, make_anew, make_lasting
from cpt.parallel.mesh import Mesh
from cpt.tensor_writer import fill, memory_for

_log = logging.getLogger(__name__)

_PENDING, _DONE, _FAILED, _UNSETTLED = range(4)  # unsettled: it is there, what follows a save has failed
# Of what a rank that failed tells the others.
_MESSAGE_BYTES = 1024


@dataclass(frozen=True)
class Ended:
    """A save that has ended after `seconds`. `failure`: rank, file and what the disk said; None if it stands.

    `is_there`: the checkpoint is; with a failure, one of what follows when it has appeared.
    """

    folder: Path
    seconds: float
    failure: str | None = None
    is_there: bool = False


class _NotSettledError(Exception):
    """What follows a save has failed; the cause says how."""


@dataclass
class _Pending:
    folder: Path
    state: Mapping[str, Any]
    then: Callable[[], None]
    work: Future
    is_joining: bool = False
    began: float = field(default_factory=time.perf_counter)


class Saver:
    """Writes one checkpoint after another; every method but `close` is collective.

    What is written in the background is copied first, into memory that is kept and used again, because making it anew
    takes longer than filling it; on a GPU's host it is pinned. `close` when done: it waits for this rank's thread.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Return when this rank's thread has ended; a save that not all ranks have finished never appears."""
        self._thread.shutdown()

    @property
    def is_pending(self) -> bool:
        """Whether a save is on its way; the same on all ranks."""
        return self._pending is not None

    def begin(
        self,
        folder: Path,
        content: Content,
        then: Callable[[], None] = lambda: None,
        *,
        copies: bool,
        before: Callable[[], None] = lambda: None,
    ) -> Ended | None:
        """Let the checkpoint `folder` be written; None, or why that could not even begin.

        `before` is called on every rank; nothing is written if it raises OSError. `then` is called by the first rank's
        thread when the folder is in place, before the save counts as ended.
        If it `copies`, values may change at once; else the caller must `wait` first, and no memory is taken.
        """
        assert self._pending is None, "one save at a time"
        began, part, aside = time.perf_counter(), Part.of_rank(self._mesh.rank, content), aside_of(folder)
        num_bytes = self._total(part.layout.num_bytes)
        made: Future = Future()
        try:
            before()
            made.set_result(make_anew(aside, num_bytes) if self._mesh.is_first else None)
        except OSError as error:
            made.set_exception(error)
        of_ranks = self._agree(made)
        if _FAILED in of_ranks:
            return Ended(folder, time.perf_counter() - began, self._message(of_ranks, made))
        try:
            written = self._thread.submit(part.write, aside, self._image(part) if copies else None)
        except (MemoryError, RuntimeError) as error:  # no memory for the copy
            written = Future()
            written.set_exception(error)
        self._pending = _Pending(folder, content.state, then, written, began=began)
        return None

    def poll(self) -> Ended | None:
        """How the save that was on its way has ended; None if it has not, or there is none."""
        pending = self._pending
        if pending is None:
            return None
        of_ranks = self._agree(pending.work)
        if _PENDING in of_ranks:
            return None
        has_failed = max(of_ranks) >= _FAILED
        if has_failed or pending.is_joining:
            failure = self._message(of_ranks, pending.work) if has_failed else None
            if failure and self._mesh.is_first:
                shutil.rmtree(aside_of(pending.folder), ignore_errors=True)
            self._pending = None
            return Ended(pending.folder, time.perf_counter() - pending.began, failure, _FAILED not in of_ranks)
        pending.is_joining, pending.work = True, Future()
        if self._mesh.is_first:
            pending.work = self._thread.submit(self._join, pending)
        else:
            pending.work.set_result(None)
        return None

    def wait(self) -> Ended | None:
        """How the save that was on its way has ended, as soon as it has; None if there was none."""
        while self._pending is not None:
            concurrent.futures.wait([self._pending.work])
            if ended := self.poll():
                return ended
        return None

    def _join(self, pending: _Pending) -> None:
        join_parts(aside_of(pending.folder), pending.folder, pending.state, self._mesh.size)
        try:
            make_lasting(pending.folder)
            pending.then()
        except Exception as error:  # whatever it is, the checkpoint is there
            raise _NotSettledError from error

    def _image(self, part: Part) -> torch.Tensor:
        """The part's file as its tensors are now, in host memory."""
        is_pinned, num_bytes = self._mesh.device.type == "cuda", part.layout.num_bytes
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # first, so that both are never there
            self._memory = memory_for(num_bytes, is_pinned)
        fill(self._memory, part.layout, part.tensors)
        if is_pinned:
            torch.cuda.synchronize(self._mesh.device)
        return self._memory

    def _total(self, number: int) -> int:
        return int(self._mesh.sum(torch.tensor(number, dtype=torch.int64, device=self._mesh.device)))

    def _agree(self, work: Future) -> list[int]:
        """Of every rank's work: pending, done, failed or unsettled."""
        here = _PENDING
        if work.done():
            error = work.exception()
            here = _UNSETTLED if isinstance(error, _NotSettledError) else _FAILED if error else _DONE
        of_ranks = torch.zeros(self._mesh.size, dtype=torch.int64, device=self._mesh.device)
        of_ranks[self._mesh.rank] = here
        return self._mesh.sum(of_ranks).tolist()

    def _message(self, of_ranks: list[int], work: Future) -> str:
        """What the first of the ranks that failed has to tell, on all of them."""
        rank = next(rank for rank, state in enumerate(of_ranks) if state >= _FAILED)
        text = torch.zeros(_MESSAGE_BYTES, dtype=torch.int32, device=self._mesh.device)
        if self._mesh.rank == rank:
            raw = _told(work.exception()).encode()[:_MESSAGE_BYTES]
            text[: len(raw)] = torch.tensor(list(raw), dtype=torch.int32)
        raw = bytes(self._mesh.sum(text).tolist()).rstrip(b"\0")
        return f"rank {rank}: {raw.decode(errors='replace')}"


def write_checkpoint(folder: Path, content: Content, mesh: Mesh) -> None:
    """Write the checkpoint `folder` while all ranks wait; every rank must call it with its own pieces.

    The folder appears by one rename when everything is on the disk; a folder of that name from before is replaced.
    Raises OSError on every rank if a disk does not take it; then nothing appeared, or the message says that it may not
    outlast a power cut.
    """
    with Saver(mesh) as saver:
        ended = saver.begin(folder, content, copies=False) or saver.wait()
    if ended.failure:
        told = "is written, but may not outlast a power cut" if ended.is_there else "could not be written"
        raise OSError(f"{folder} {told}: {ended.failure}")


def _told(error: BaseException) -> str:
    """`FILE: No space left on device`; what no disk said is told with its traceback in this rank's log."""
    if isinstance(error, _NotSettledError):
        error = error.__cause__
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    _log.error("a save has failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
