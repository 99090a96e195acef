"""Which checkpoints of a run stay: the newest few, some for ever, and at most one that was saved for safety alone.

    temporary       saved because of the time that had gone by; goes when another is written
    kept for ever   its step was the first at or past a multiple of `keep_every_tokens`
    others          the newest `keep_last` of these and of those kept for ever stay

What a checkpoint is, it says in its `state.json`. One that a disk did not give when the run went on from an earlier one
may be whole: it is put by under another name, and goes when the run has saved that step anew, or a later one.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from cpt.checkpoint.write import checkpoint_folders, step_of

TEMPORARY = "temporary"
FOR_EVER = "kept_for_ever"
UNREAD = "unread"  # as a mark: the disk does not give it

_PUT_BY = re.compile(rf"step-(\d+)-{UNREAD}\d*")


def mark_of(folder: Path) -> str | None:
    """TEMPORARY, FOR_EVER, UNREAD, or None for any other; also for one that is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError:
        return UNREAD
    marks = [mark for mark in (TEMPORARY, FOR_EVER) if isinstance(state, dict) and state.get(mark) is True]
    return marks[0] if marks else None


def marked(state: dict[str, Any], mark: str | None) -> dict[str, Any]:
    """`state` with that mark, for `state.json`."""
    return {**state, mark: True} if mark else state


def superseded(checkpoints: Path, newest: Path, keep_last: int) -> list[Path]:
    """The checkpoints that go when `newest` is there.

    Later ones go too: they were damaged, or the run would have gone on from them. An earlier one that the disk does not
    give may be for ever: it stays, and counts for nothing.
    """
    folders = checkpoint_folders(checkpoints)
    until = folders.index(newest) + 1
    marks = {folder: mark_of(folder) for folder in folders[:until]}
    lasting = [folder for folder in folders[:until] if marks[folder] not in (TEMPORARY, UNREAD)]
    stay = {newest, *lasting[-keep_last:], *(folder for folder in marks if marks[folder] in (FOR_EVER, UNREAD))}
    names = {folder: _PUT_BY.fullmatch(folder.name) for folder in sorted(checkpoints.glob("step-*"))}
    reached = [folder for folder, name in names.items() if name and int(name[1]) <= step_of(newest)]
    return [*(folder for folder in folders if folder not in stay), *reached]


def put_by(folder: Path) -> Path:
    """Give a checkpoint a name that no run goes on from; raises OSError if the disk refuses."""
    names = (folder.with_name(f"{folder.name}-{UNREAD}{number or ''}") for number in itertools.count())
    return folder.rename(next(name for name in names if not name.exists()))


def num_bytes_of_checkpoint(num_parameters: int, num_copies: int) -> int:
    """On the disk, all ranks together: fp32 masters, two moments and what methods keep of each parameter."""
    return num_parameters * 4 * (3 + num_copies)


def bytes_short(checkpoints: Path, num_bytes: int, keep_last: int) -> int:
    """How much the disk lacks to hold `keep_last` checkpoints of `num_bytes` and one more while it is written."""
    there = checkpoint_folders(checkpoints) if checkpoints.is_dir() else []
    num_more = max(1, keep_last + 1 - len(there))
    return max(0, num_more * num_bytes - free_bytes(checkpoints))


def free_bytes(folder: Path) -> int:
    """Room on the disk where `folder` is, or will be made."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
