"""One start of a run, from taking its folder to its end, as `attempts.jsonl` tells it."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cpt.config import Fault
from cpt.observe import attempts
from cpt.observe.logs import keep_in_file
from cpt.observe.lost_pages import tell_lost_pages
from cpt.parallel.mesh import Mesh
from cpt.parallel.together import OtherRankError
from cpt.parallel.watch import first_line, is_of_a_connection

_PLACE_OF_START = 19  # of the fields after the name, in /proc/PID/stat: ticks since the machine was started

_ends: list[float] = []  # of the attempts before in this process, on its monotonic clock


@dataclass
class Attempt:
    """An attempt that goes on. Its first rank tells what comes of it."""

    folder: Path
    mesh: Mesh

    def trains(self, step: int) -> None:
        """All is prepared, and the step after `step` comes next."""
        if self.mesh.is_first:
            attempts.note_attempt(self.folder, "training", step=step)

    def ends(self, step: int, signal: int | None, is_by_file: bool = False) -> None:
        """The run is finished, or was stopped by a signal, or by the file `stop`, and has saved."""
        if self.mesh.is_first and signal is None:
            attempts.note_end(self.folder, how=attempts.FINISHED, step=step)
        elif self.mesh.is_first:
            by = {"by": attempts.BY_FILE} if is_by_file else {}
            attempts.note_end(self.folder, how=attempts.STOPPED, step=step, signal=int(signal), **by)

    def loses_page(self, line: str) -> None:
        """This process is about to end because a mapped file cannot be read, as `line` tells."""
        where = f"rank {self.mesh.rank}: " if self.mesh.size > 1 else ""
        with suppress(OSError):
            os.write(2, f"cpt train: {where}{line}\n".encode())
        keep_in_file([line])
        _note_failure(self.folder, self.mesh, OSError(line))
        self.mesh.watch.fails(line)


@contextmanager
def attempt(folder: Path, mesh: Mesh, step: int, job: str | None) -> Iterator[Attempt]:
    """Note that the run starts at `step`, as part of a SLURM `job` or of none, and how it ends if it fails inside.

    All ranks call it. What broke because another rank ended is left for the watch to tell.
    """
    mesh.watch.alive(step=step + 1)
    nodes = list(dict.fromkeys(mesh.texts(socket.gethostname())))
    if mesh.is_first:
        number = 1 + sum(event["event"] == "started" for event in attempts.read_attempts(folder))
        attempts.note_attempt(
            folder, "started", step=step, ranks=mesh.size, nodes=nodes, job=job, attempt=number,
            prepared_seconds=round(_seconds_free(), 3),
        )  # fmt: skip
    this = Attempt(folder, mesh)
    tell_lost_pages(this.loses_page)
    try:
        yield this
    except OtherRankError:
        raise
    except BaseException as error:
        is_told_by_watch = mesh.size > 1 and is_of_a_connection(error)
        is_everybodys = getattr(error, "is_everybodys", False)
        if not is_told_by_watch and (mesh.is_first or not is_everybodys):
            _note_failure(folder, mesh, error)
        raise
    finally:
        _ends.append(time.monotonic())


def _seconds_free() -> float:
    """Since when this process has worked for the attempt that begins: since it began, or the one before in it ended."""
    if _ends:
        return time.monotonic() - _ends[-1]
    try:
        began = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[_PLACE_OF_START]
    except OSError:  # no Linux
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")


def _note_failure(folder: Path, mesh: Mesh, error: BaseException) -> None:
    reason = " ".join(str(error).split()) if isinstance(error, Fault | OSError) else first_line(error)
    is_everybodys = getattr(error, "is_everybodys", False)
    if is_everybodys:
        reason = str(error)
    elif not isinstance(error, Fault | OSError | KeyboardInterrupt):
        keep_in_file(traceback.format_exception(error))
    attempts.note_end(
        folder,
        how=attempts.FAILED,
        step=mesh.watch.steps_done,
        reason=reason,
        rank=None if is_everybodys else mesh.rank,
        node=None if is_everybodys else socket.gethostname(),
        is_final=getattr(error, "is_final", isinstance(error, Fault) and not error.is_passing),
    )
