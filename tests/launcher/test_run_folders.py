"""What the supervisor sees of the folders of the runs that it looks after."""

from __future__ import annotations

import errno
import pathlib

import pytest
from cpt_harness import disks

from cpt.observe.attempts import ATTEMPTS, note_attempt
from cpt_launcher.run_folders import RunFolders


def test_only_what_was_noted_since_is_told(tmp_path):
    runs = RunFolders([tmp_path])
    note_attempt(tmp_path, "ended", how="failed")
    before = runs.num_told()
    assert runs.events(before) == [] and runs.end_after(before) is None
    note_attempt(tmp_path, "ended", how="finished")
    assert runs.end_after(before)["how"] == "finished"


def test_a_file_that_began_anew_meanwhile_is_told_whole(tmp_path):
    runs = RunFolders([tmp_path])
    for _ in range(3):
        note_attempt(tmp_path, "started")
    before = runs.num_told()
    (tmp_path / ATTEMPTS).unlink()
    note_attempt(tmp_path, "ended", how="failed", reason="the folder was deleted")
    assert runs.end_after(before)["reason"] == "the folder was deleted"


def everything(runs: RunFolders) -> tuple:
    """All that a supervisor asks of it."""
    return runs.are_finished(), runs.have_stop_file(), runs.newest_step(), runs.num_told(), runs.events()


@pytest.fixture
def saved(tmp_path):
    """Begins a run in a folder that is there: two events, and a checkpoint of step 30."""

    def begin(folder: pathlib.Path) -> RunFolders:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text("step-00000030")
        note_attempt(folder, "launched")
        note_attempt(folder, "started")
        return RunFolders([folder])

    return begin


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_while_the_disk_gives_errors_what_was_read_last_is_the_answer_and_that_is_said_once(
    saved, tmp_path, monkeypatch, caplog, number
):
    runs = saved(tmp_path)
    before = everything(runs)

    def fail(path, *words, **more):
        raise OSError(number, "it fails", str(path))

    with monkeypatch.context() as broken, caplog.at_level("WARNING"):
        for name in ("stat", "read_text", "open"):
            broken.setattr(pathlib.Path, name, fail)
        broken.setattr("os.stat", fail)
        assert [everything(runs) for _ in range(3)] == [before] * 3
    assert len(caplog.messages) == 1 and "cannot be read, which ends nothing: it fails" in caplog.messages[0]
    note_attempt(tmp_path, "ended")
    assert runs.num_told() == [3]


def test_a_disk_that_died_is_survived(saved, tmp_path):
    with disks.on_device(tmp_path / "disk", 16 * disks.MIB) as disk:
        runs = saved(disk.path)
        before = everything(runs)
        disk.die()
        with pytest.raises(OSError):
            (disk.path / ATTEMPTS).read_text()
        assert everything(runs) == before


def test_what_was_noted_before_it_could_be_read_at_all_is_not_taken_for_new(saved, tmp_path, monkeypatch):
    runs = saved(tmp_path)
    note_attempt(tmp_path, "ended", how="failed")

    def fail(path, *words, **more):
        raise OSError(errno.EIO, "it fails", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "read_text", fail)
        before = runs.num_told()
    assert before == [None] and runs.end_after(before) is None and len(runs.events()) == 3
