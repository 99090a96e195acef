"""Line-by-line JSON files that survive a killed writer: `metrics.jsonl`, `scores.jsonl`, `order.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Records:
    """Appends one JSON object a line, each flushed at once. `keep_until_step`: on opening, later lines are dropped.

    A run that goes on from a checkpoint drops what was written after it, so that each step stands there once.
    """

    def __init__(self, path: Path, keep_until_step: int) -> None:
        kept = [line for line in read_records(path) if line["step"] <= keep_until_step] if path.exists() else []
        aside = path.with_name(path.name + ".aside")
        aside.write_text("".join(_as_line(record) for record in kept), encoding="utf-8")
        aside.replace(path)
        self.kept = kept
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; `record` has a `step`."""
        self._file.write(_as_line(record))

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line; a last line that a killed writer left torn is passed over."""
    with path.open("rb") as file:  # the torn line may end within a character
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
