"""Ranks of `cpt train` in forked processes that a test may stop, kill and hold up, and how each of them ended."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cpt.observe.attempts import read_attempts
from cpt_harness import ranks, runs  # noqa: F401 (`ranks` imports what every rank needs, once)
from cpt_launcher.rendezvous import pick_free_port

# Of a watch that finds out soon, but not on a machine that is only slow.
WATCH = {"hang_seconds": 6, "slow_seconds": 60, "lost_seconds": 6}


class Ranks:
    """Processes by rank; what each has told on its standard error, and how it ended."""

    def __init__(self, pids: Sequence[int], folder: Path) -> None:
        self.pids, self._folder = list(pids), folder
        self._statuses: dict[int, int] = {}

    def told(self, rank: int) -> str:
        """Standard error of a rank so far."""
        return (self._folder / f"told-{rank}").read_text(errors="replace")

    def status(self, rank: int) -> int | None:
        """Exit status, negative for a signal; None as long as it runs."""
        if rank not in self._statuses:
            ended, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if ended:
                self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return self._statuses.get(rank)

    def wait(self, *some: int, seconds: float = runs.SECONDS) -> list[int]:
        """The exit statuses of these ranks, of all if none is named; fails if they do not end."""
        some = some or tuple(range(len(self.pids)))
        runs.wait_for(lambda: all(self.status(rank) is not None for rank in some), f"ranks {some} to end", seconds)
        return [self._statuses[rank] for rank in some]

    def wait_for_step(self, run: Path, step: int) -> None:
        """Return when the run has told of that step; fails if a rank has ended before."""

        def is_there() -> bool:
            ended = [rank for rank in range(len(self.pids)) if self.status(rank) is not None]
            assert not ended, f"rank {ended[0]} has ended: {self.told(ended[0])}"
            return runs.num_lines(run / "metrics.jsonl") >= step

        runs.wait_for(is_there, f"step {step} of {run}")

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to one of them, if it has not ended."""
        if self.status(rank) is None:
            os.kill(self.pids[rank], number)


@contextmanager
def started(
    *words: object, number: int, folder: Path, before: Callable[[int], None] = lambda rank: None
) -> Iterator[Ranks]:
    """`cpt train WORDS` on that many ranks; they are killed afterwards. `before(rank)` is called in each."""
    port = pick_free_port()
    for rank in range(number):
        (folder / f"told-{rank}").touch()
    pids = [_fork([str(word) for word in words], rank, number, port, folder, before) for rank in range(number)]
    here = Ranks(pids, folder)
    try:
        yield here
    finally:
        for rank in range(number):
            here.send(rank, signal.SIGKILL)
        here.wait()


def _fork(words: list[str], rank: int, number: int, port: int, folder: Path, before: Callable[[int], None]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        from cpt.cli import main
        from cpt.parallel import mesh

        signal.signal(signal.SIGINT, signal.default_int_handler)
        told = os.open(folder / f"told-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(told, 2)
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 (the process ends with it)
        if number > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
            os.environ.update(LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        mesh.threads_for = lambda local_size: 1
        before(rank)
        status = main(["train", *words])
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        os._exit(status)


def at_step(step: int, does: Callable[[], Any]) -> None:
    """Call `does` in this process when it loads the windows of that step, counted from where it begins."""
    from cpt.data.loader import Loader

    really, left = Loader.batch, [step]

    def batch(loader: Loader, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            does()
        return really(loader, *arguments)

    Loader.batch = batch


def sleep_for_ever() -> None:
    """As on a disk that does not answer."""
    while True:
        time.sleep(1)


def last_end(run: Path) -> dict[str, Any]:
    """The only `ended` of the last attempt."""
    events = read_attempts(run)
    start = max(place for place, event in enumerate(events) if event["event"] == "started")
    (ended,) = [event for event in events[start:] if event["event"] == "ended"]
    return ended


def run_out_of_memory() -> None:
    """From now on this process gets no more address space, and what it asks for next is refused."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held, held))
    torch.empty(1 << 30)
