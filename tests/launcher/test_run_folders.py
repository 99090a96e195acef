"""What the supervisor sees of the folders of the runs that it looks after."""

from __future__ import annotations

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
