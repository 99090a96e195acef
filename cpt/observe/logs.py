"""Where log lines go: the first rank tells the story on the terminal, every rank keeps a file of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

_OURS = ("cpt", "cpt_launcher")  # whose lines are told
_LAYOUT = "%(asctime)s %(levelname).1s %(message)s"


class _AboveTheBar(logging.Handler):
    """Writes lines to standard error; a progress bar that stands there moves down."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # a terminal that has gone must not end the run
            self.handleError(record)


class _OnDisk(logging.FileHandler):
    """Writes lines to a file; while the disk is full they wait in memory, and nothing else is said about it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to_terminal(rank: int = 0) -> None:
    """Show lines on standard error: everything from info on of the first rank, warnings of the others.

    What libraries warn of in Python's own way is kept out of the terminal; `log_to_file` keeps it.
    """
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter(_LAYOUT if rank == 0 else f"[rank {rank}] {_LAYOUT}", "%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for ours in map(logging.getLogger, _OURS):
        ours.handlers, ours.propagate = [handler], False
        ours.setLevel(logging.DEBUG)  # the handlers choose
    logging.captureWarnings(True)


def log_to_file(folder: Path, rank: int) -> None:
    """Keep this rank's lines, all of them, in `folder/logs/rank-NNNNN.log` too, after what is there from before.

    From here on they go to this file and no longer to that of a run before in the same process.
    """
    (folder / "logs").mkdir(exist_ok=True)
    handler = _OnDisk(folder / "logs" / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for logger in map(logging.getLogger, (*_OURS, "py.warnings")):
        for old in [old for old in logger.handlers if isinstance(old, logging.FileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)


def keep_in_file(lines: Iterable[str]) -> None:
    """Keep errors that the terminal learns of in another way in this rank's file, if there is one already."""
    ours = logging.getLogger(_OURS[0])
    files = [handler for handler in ours.handlers if isinstance(handler, logging.FileHandler)]
    for line in lines:
        record = ours.makeRecord(ours.name, logging.ERROR, __file__, 0, line, (), None)
        for file in files:
            file.handle(record)
