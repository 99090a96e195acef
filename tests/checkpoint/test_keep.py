"""Which checkpoints stay: the last few, those for ever, one temporary; and whether the disk has room for them."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest

from cpt.checkpoint import RunFolder, keep, step_folder

MARKS = {"t": keep.TEMPORARY, "e": keep.FOR_EVER, "r": None}


def make(folder: Path, story: str) -> RunFolder:
    """Checkpoints of steps 10, 20, ... marked as the letters say: temporary, for ever, regular; x is a damaged one."""
    run = RunFolder(folder)
    for number, letter in enumerate(story, 1):
        place = run.checkpoint_at(10 * number)
        place.mkdir(parents=True)
        state = "torn {" if letter == "x" else json.dumps(keep.marked({}, MARKS[letter]))
        (place / "state.json").write_text(state)
    return run


@pytest.mark.parametrize(
    ("story", "keep_last", "stay"),
    [
        ("rrrr", 2, [30, 40]),
        ("errr", 2, [10, 30, 40]),
        ("erer", 1, [10, 30, 40]),
        ("eeee", 1, [10, 20, 30, 40]),
        ("rtr", 2, [10, 30]),  # the temporary one goes when a regular one is there
        ("rrrt", 2, [20, 30, 40]),  # and does not count among the last
        ("rrtt", 2, [10, 20, 40]),
        ("rte", 1, [30]),
        ("t", 1, [10]),
        ("xrxr", 2, [30, 40]),  # damage has no mark
    ],
)
def test_what_stays(tmp_path, story, keep_last, stay):
    run = make(tmp_path, story)
    run.keep_newest(run.checkpoint_at(10 * len(story)), keep_last)
    there = sorted(path.name for path in run.checkpoints.iterdir())
    assert there == ["latest", *(step_folder(tmp_path, step).name for step in stay)]


def test_one_whose_mark_a_disk_does_not_give_stays_because_it_may_be_for_ever_and_takes_nobodys_place(
    tmp_path, monkeypatch
):
    run, give = make(tmp_path, "rrerr"), Path.read_text

    def read_text(path, *more, **named):
        if path.parent == run.checkpoint_at(30):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return give(path, *more, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert keep.superseded(run.checkpoints, run.checkpoint_at(50), 3) == [run.checkpoint_at(10)]


def test_what_cannot_be_removed_is_told_and_the_new_one_stands(tmp_path, monkeypatch, caplog):
    run = make(tmp_path, "rr")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    monkeypatch.setattr(logging.getLogger("cpt"), "propagate", True)  # a command in an earlier test may have cut it
    run.keep_newest(run.checkpoint_at(20), 1)
    assert f"{run.checkpoint_at(10)} cannot be removed: Permission denied" in caplog.text
    assert (run.checkpoints / "latest").read_text() == "step-00000020\n"


def test_room_is_wanted_for_those_that_are_kept_and_the_one_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 250})())
    assert keep.bytes_short(tmp_path / "not" / "there" / "yet", 100, 2) == 50
    assert keep.bytes_short(tmp_path, 100, 1) == 0
    make(tmp_path, "rr")  # these have their room already; one more is wanted
    assert keep.bytes_short(tmp_path / "checkpoints", 100, 2) == 0
    assert keep.bytes_short(tmp_path / "checkpoints", 300, 2) == 50
