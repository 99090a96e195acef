"""What became of each start of a run, and when: `attempts.jsonl` of its folder, a line an event, never rewritten.

    submitted --> started --> training --> ended            an attempt as it should be
              --> ended, has_started: false                 it could not take the folder, or its ranks did not meet
                                       (nothing)            its processes were killed: the next `started` tells
    restarting, requeued                                    what the supervisor made of an end

An exit status cannot say what happened: launchers lose it. `cpt status`, `cpt report` and the supervisor read this file
instead. Whoever has something to say appends one line in one write, so that several processes may; a line that was torn
by a full disk is passed over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ATTEMPTS = "attempts.jsonl"

# `how` of an `ended`: the run is done; asked to stop, and saved; failed, and why stands in `reason`.
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
BY_FILE = "file"  # `by` of an `ended`: whoever asked to stop did so by the file `stop`

_log = logging.getLogger(__name__)


def note_attempt(folder: Path, event: str, **fields: Any) -> bool:
    """Append an event, with the time of day, to the file in the run folder; False if the disk does not take it.

    Never raises: what is to be told must not be lost because it cannot be noted.
    """
    line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n"
    try:
        # One write to a file opened to append is whole, whoever else writes; a line without an end before it is ended.
        with (folder / ATTEMPTS).open("ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                line = "\n" + line
            os.write(file.fileno(), line.encode())
    except OSError as error:
        _log.warning("%s: %s cannot be noted: %s", folder / ATTEMPTS, event, error.strerror)
        return False
    return True


def note_end(folder: Path, **fields: Any) -> bool:
    """Note that the attempt that goes on has `ended`; False if somebody has noted that already, or it never started.

    Ranks that find at the same time that it is over so tell it once: one looks and writes while the others wait.
    """
    with _alone_with(folder):
        try:
            events = [one["event"] for one in read_attempts(folder) if one["event"] == "started" or is_of_started(one)]
        except OSError as error:  # the disk may be why it ends
            _log.warning("%s: ended cannot be noted: %s", folder / ATTEMPTS, error.strerror)
            return False
        return events[-1:] == ["started"] and note_attempt(folder, "ended", **fields)


def note_end_before_start(folder: Path, reason: str, **fields: Any) -> bool:
    """Note that an attempt `ended` that could not start, for a reason that may pass; False if an end is noted already.

    It may be that another attempt goes on in the folder: such an end is none of its.
    """
    with _alone_with(folder):
        try:
            events = [one["event"] for one in read_attempts(folder)]
        except OSError:
            return False
        events = [event for event in events if event in ("launched", "started", "ended")]
        if events[-1:] == ["ended"]:
            return False
        fields = {"how": FAILED, "reason": reason, **fields, "is_final": False, "has_started": False}
        return note_attempt(folder, "ended", **fields)


def is_of_started(event: dict[str, Any]) -> bool:
    """Whether it is the end of an attempt that had started."""
    return event["event"] == "ended" and event.get("has_started", True)


def last_end(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The `ended` after which nothing was started; None if there is none.

    Where some attempt started, ends of those that could not start are passed over.
    """
    told = [event for event in events if event["event"] in ("started", "ended")]
    if any(event["event"] == "started" for event in told):
        told = [event for event in told if event["event"] == "started" or is_of_started(event)]
    return told[-1] if told and told[-1]["event"] == "ended" else None


@contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """One process of all that ask for it at a time, where the file system knows locks."""
    try:
        file = (folder / ATTEMPTS).open("rb")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Every event in order; none if there is no file. Lines that are torn are left out."""
    try:
        text = (folder / ATTEMPTS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "time" in event:
            events.append(event)
    return events


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
