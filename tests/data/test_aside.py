"""A folder is written aside and appears whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from cpt.config import Fault
from cpt.data.prepare.aside import written_aside


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with written_aside(tmp_path / "c") as folder:
        (folder / "x").write_text("ours")
        assert not (tmp_path / "c").exists()
    assert (tmp_path / "c" / "x").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "c") as folder:
        (folder / "x").write_text("ours")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_output_taken_while_building_is_refused(tmp_path):
    with pytest.raises(Fault, match="is there already"), written_aside(tmp_path / "c") as folder:
        (folder / "x").write_text("ours")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "x").write_text("theirs")
    assert (tmp_path / "c" / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_output_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    message = r"cannot write to .*file/deep: .*; choose another --output"
    with pytest.raises(Fault, match=message), written_aside(tmp_path / "file" / "deep" / "c"):
        pass


def test_a_rename_that_fails_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    message = r"cannot rename .*c\.partial-\w+ to .*c: Invalid cross-device link"
    with pytest.raises(Fault, match=message), written_aside(tmp_path / "c"):
        pass
    assert list(tmp_path.iterdir()) == []
