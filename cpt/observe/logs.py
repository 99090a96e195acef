"""Where log lines go: the first rank tells the story on the terminal, every rank keeps a file of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

__all__ = ["log_to_file", "log_to_terminal", "logging_redirect_tqdm"]

_LAYOUT = "%(asctime)s %(levelname).1s %(message)s"


def log_to_terminal(rank: int = 0) -> None:
    """Show lines on standard error: everything from info on of the first rank, warnings of the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_LAYOUT if rank == 0 else f"[rank {rank}] {_LAYOUT}", "%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours = logging.getLogger("cpt")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)


def log_to_file(folder: Path, rank: int) -> None:
    """Keep this rank's lines in `folder/logs/rank-NNNNN.log` too, after what is there from before."""
    (folder / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger("cpt").addHandler(handler)
