"""Line-by-line JSON files that survive a killed writer: `metrics.jsonl`, `scores.jsonl`, `order.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_log = logging.getLogger(__name__)


class Records:
    """Appends one JSON object a line, each flushed at once. `keep_until_step`: on opening, later lines are dropped.

    A run that goes on from a checkpoint drops what was written after it, so that each step stands there once; `kept`
    and `dropped` are the objects of that moment.

    What the disk does not take is kept in memory and written with the next line: a full disk ends no run.
    """

    def __init__(self, path: Path, keep_until_step: int) -> None:
        before = list(read_records(path)) if path.exists() else []
        kept = [line for line in before if line["step"] <= keep_until_step]
        aside = path.with_name(path.name + ".aside")
        aside.write_text("".join(_as_line(record) for record in kept), encoding="utf-8")
        aside.replace(path)
        self.kept = kept
        self.dropped = [line for line in before if line["step"] > keep_until_step]
        self._path = path
        self._file = self._open()
        self._left = bytearray()
        self._has_warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; `record` has a `step`. If the disk does not take it, that is told once."""
        self._left += _as_line(record).encode()
        try:
            self.settle()
        except OSError as error:
            if not self._has_warned:
                told = "%s: %s; its lines are kept in memory, and no checkpoint is saved until they are written"
                _log.warning(told, self._path, error.strerror)
            self._has_warned = True

    def settle(self) -> None:
        """Write what is left; raises OSError if the disk does not take all of it."""
        try:
            while self._left:
                del self._left[: self._file.write(self._left)]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._has_warned:
            _log.info("%s: all lines are written again", self._path)
        self._has_warned = False  # a disk that fills up again is told again

    def keep(self) -> None:
        """Write what is left and put it on the disk, so that even a power cut leaves it; OSError if that fails.

        A file that was deleted is written again: while it is open, what it held is there.
        """
        if not self._path.exists():
            self._write_again()
        self.settle()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _write_again(self) -> None:
        held = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(self._path.name + ".aside")
        aside.write_bytes(held)
        aside.replace(self._path)
        self._file.close()
        self._file = self._open()

    def _open(self) -> BinaryIO:
        # How much of a line the disk took must be known: no buffer. To be read: see `keep`.
        return self._path.open("ab+", buffering=0)

    def close(self) -> None:
        """Close the file; nothing is lost without it but what the disk does not take."""
        try:
            self.settle()
        except OSError as error:
            _log.error("%s: %s: its last lines are lost; the run makes those steps again", self._path, error.strerror)
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line; a last line that a killed writer left torn is passed over."""
    with path.open("rb") as file:  # the torn line may end within a character
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def number_or_none(value: float) -> float | None:
    """As JSON knows it: None for what is not finite."""
    return value if math.isfinite(value) else None


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
