"""The folder of a run: what it keeps, what it refuses, and what a sudden end may leave in it."""

from __future__ import annotations

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from cpt_harness.ranks import in_processes

from cpt.checkpoint import Place, RunFolder
from cpt.checkpoint.keep import put_by
from cpt.checkpoint.place import StageBehind
from cpt.checkpoint.write import make_anew
from cpt.config import Fault
from cpt.lineage.areas import Areas
from cpt.lineage.ledger import Entry, Ledger, ShareChange
from cpt.parallel.mesh import ALONE
from cpt.progress import Progress


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    return folder


def make(run: RunFolder, *steps: int) -> None:
    for step in steps:
        run.checkpoint_at(step).mkdir(parents=True)
        (run.checkpoint_at(step) / "state.json").write_text("{}")


def steps_of(run: RunFolder) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*"))


@pytest.mark.parametrize(("number", "kept"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_the_newest_are_kept_and_latest_names_the_newest(run, number, kept):
    make(run, 10, 20, 30)
    run.keep_newest(run.checkpoint_at(30), number)
    assert steps_of(run) == kept
    assert (run.checkpoints / "latest").read_text() == "step-00000030\n"


@pytest.mark.parametrize(("number", "kept"), [(1, [25]), (2, [20, 25])])
def test_the_one_just_saved_is_kept_though_a_damaged_later_one_lies_there(run, number, kept):
    """The run went back from the damaged 30 to 20 and then saved 25."""
    make(run, 10, 20, 25, 30)
    run.keep_newest(run.checkpoint_at(25), number)
    assert steps_of(run) == kept


def test_what_a_killed_save_left_is_removed_by_the_next(run):
    make(run, 10, 20)
    (run.checkpoints / ".step-00000013.aside").mkdir()
    run.keep_newest(run.checkpoint_at(20), 2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["latest", "step-00000010", "step-00000020"]


def test_what_was_put_by_goes_when_that_step_is_saved_or_a_later_one_and_a_second_one_finds_room_beside_it(run):
    there = lambda: sorted(path.name for path in run.checkpoints.glob("step-*"))  # noqa: E731
    for _ in range(2):
        make(run, 20)
        put_by(run.checkpoint_at(20))
    (run.checkpoints / "step-00000020-unread-mine").mkdir()
    make(run, 10)
    before = ["step-00000020-unread", "step-00000020-unread-mine", "step-00000020-unread1"]
    run.keep_newest(run.checkpoint_at(10), 1)
    assert there() == ["step-00000010", *before]
    make(run, 20)
    run.keep_newest(run.checkpoint_at(20), 1)
    assert there() == ["step-00000020", "step-00000020-unread-mine"]


def leave_as_killed_between_the_renames(run: RunFolder, step: int) -> None:
    """What a second save of `step` leaves: what was there and what was to be, both whole, under hidden names."""
    for name in (".step-{:08d}.old.aside", ".step-{:08d}.aside"):
        (run.checkpoints / name.format(step)).mkdir(parents=True)
        (run.checkpoints / name.format(step) / "state.json").write_text(json.dumps(name))


def test_a_checkpoint_that_a_killed_save_has_moved_away_gets_its_name_back_from_whoever_takes_the_folder(run):
    leave_as_killed_between_the_renames(run, 10)
    with run.taken(ALONE):
        assert steps_of(run) == [10]
        assert "old" in (run.checkpoint_at(10) / "state.json").read_text()


def test_nobody_gives_it_its_name_back_while_another_process_has_taken_the_folder_and_may_be_between_the_renames(run):
    with run.taken(ALONE):
        leave_as_killed_between_the_renames(run, 10)
        with pytest.raises(Fault, match="another process is training there"):
            RunFolder(run.path).take_back()
        assert steps_of(run) == []
    RunFolder(run.path).take_back()
    assert steps_of(run) == [10]


def test_one_that_was_replaced_does_not_come_back(run):
    """The save was killed after both renames, and the checkpoint that has taken the place goes before it."""
    leave_as_killed_between_the_renames(run, 10)
    make(run, 5, 10)
    run.take_back()
    run.forget_after(run.checkpoint_at(5))
    run.take_back()
    assert steps_of(run) == [5]


def test_a_save_in_the_same_process_after_two_renames_that_failed_loses_nothing(run):
    leave_as_killed_between_the_renames(run, 10)
    make_anew(run.checkpoints / ".step-00000020.aside")
    assert steps_of(run) == [10]


def test_where_nothing_was_left_no_lock_is_taken(run):
    run.take_back()
    assert list(run.path.iterdir()) == []


def test_a_file_in_place_of_the_folder_and_a_folder_of_something_else_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault, match="this is a file; name a folder"):
        RunFolder(tmp_path / "file").refuse_other_contents()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("")
    with pytest.raises(Fault, match="the folder is used, but not by a run"):
        RunFolder(tmp_path / "notes").refuse_other_contents()


def test_no_folder_an_empty_one_and_what_a_sudden_end_leaves_are_accepted(tmp_path):
    RunFolder(tmp_path / "new").refuse_other_contents()
    RunFolder(tmp_path).refuse_other_contents()
    (tmp_path / "run.yaml.aside").write_text("half of i")
    RunFolder(tmp_path).refuse_other_contents()


def test_what_a_submission_leaves_before_the_run_begins_is_accepted(tmp_path):
    for name in ("logs", "snapshot"):
        (tmp_path / name).mkdir()
    for name in ("attempts.jsonl", ".lock"):
        (tmp_path / name).write_text("")
    RunFolder(tmp_path).refuse_other_contents()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault, match="the folder cannot be made: Not a directory"):
        RunFolder(tmp_path / "file" / "run").make()


def test_small_files_appear_whole(run, monkeypatch):
    run.write_json("ledger.json", {"a": 1})

    def end_suddenly(*_):
        raise KeyboardInterrupt

    def write():
        monkeypatch.setattr(type(run.path), "replace", end_suddenly)
        with pytest.raises(KeyboardInterrupt):
            run.write_json("ledger.json", {"a": 2})

    in_processes([write])
    assert json.loads((run.path / "ledger.json").read_text()) == {"a": 1}


def test_only_the_run_itself_says_that_it_is_finished(run):
    assert not run.is_finished
    run.finish(10, 1000)
    assert run.is_finished
    assert json.loads((run.path / "finished.json").read_text())["step"] == 10


def test_a_place_comes_back_from_json_as_it_was_and_a_child_begins_at_zero_with_the_ledger_and_the_rate():
    before = Ledger((Entry("prose", "data/prose", "ab", 16, 7, 100, (((0, 20),),)),))
    now = Ledger((Entry("prose", "data/prose", "ab", 16, 7, 100, (((0, 60),),)),))
    behind, continued = StageBehind(300, before), Progress(stage=3, stage_tokens=40)
    raised = (ShareChange("code", 96, Fraction(1, 3), "prose", 0.25),)
    place = Place(Progress(5, 500, 1, 2, 200), before, 1e-3, 5e-4, "ab" * 16, Areas(), behind, continued, raised)
    now = place.recorded_in(now)
    plain = json.loads(json.dumps(place.as_json(now)))
    assert Place.from_json(plain) == place
    begun = Place(ledger_before_stage=now.as_inherited(), rate_before_stage=5e-4, rate=5e-4, areas=Areas(rate=5e-4))
    assert Place.of_child(plain) == begun


def test_a_folder_is_kept_by_a_lock_on_a_file_in_it_open_for_writing_which_network_file_systems_hand_on(run):
    with run.taken(ALONE):
        with pytest.raises(Fault, match="another process is training there") as told, RunFolder(run.path).taken(ALONE):
            pass
        assert told.value.is_passing
        (lock,) = run.path.iterdir()
        assert lock.is_file() and lock.name == ".lock"
        handles = [handle for handle in Path("/proc/self/fd").iterdir() if handle.exists() and handle.samefile(lock)]
        flags = [Path(f"/proc/self/fdinfo/{handle.name}").read_text().split()[3] for handle in handles]
        assert len(flags) == 1 and int(flags[0], 8) & os.O_ACCMODE == os.O_RDWR
    with RunFolder(run.path).taken(ALONE):
        pass


def test_a_folder_that_is_deleted_and_made_again_under_a_run_stays_taken(run):
    with run.taken(ALONE):
        shutil.rmtree(run.path)
        run.make()
        with pytest.raises(Fault, match="another process is training there"), RunFolder(run.path).taken(ALONE):
            pass
    with RunFolder(run.path).taken(ALONE):
        pass


def test_a_folder_that_another_process_went_on_with_after_it_was_looked_at_is_refused(run):
    make(run, 5)
    assert run.look(ALONE) == (False, False)
    with run.taken(ALONE):
        pass
    make(run, 10)
    with pytest.raises(Fault, match="another process has gone on with it meanwhile; start again"), run.taken(ALONE):
        pass
    run.look(ALONE)
    run.finish(10, 100)
    with pytest.raises(Fault, match="meanwhile"), run.taken(ALONE):
        pass
