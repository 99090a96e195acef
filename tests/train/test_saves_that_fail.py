"""A save in the background neither holds up the run nor changes it; one that fails is told, and the run goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.checkpoint import RunFolder, find_checkpoint
from cpt.checkpoint.settings import Settings
from cpt.parallel.mesh import ALONE
from cpt.run.saving import Saving

STEPS, SAVED_EVERY = 24, 5


@pytest.fixture
def config(data, tmp_path) -> Path:
    """Two stages that end at steps 12 and 24, with a method that has state; saved at 5, 10, 12, 15, 20 and 24."""
    stages = [runs.stage(data, "prose", 12), runs.stage(data, "code", 12, replay={"share": 0.25})]
    plain = runs.settings(
        data, tmp_path / "run", stages, methods=[{"name": "reptile", "every": 7}],
        checkpoint={"every_tokens": SAVED_EVERY * runs.TOKENS_A_STEP, "keep_last": 9},
    )  # fmt: skip
    return runs.write_settings(tmp_path / "run.yaml", plain)


def failing(*steps: int, rank: int = 0, times: int = 9) -> Callable[[], None]:
    """For `before`: the disk is full for the file of that rank in the saves after these steps, so many times."""

    def patch() -> None:
        from cpt.checkpoint import write

        if int(os.environ.get("RANK", 0)) != rank:
            return
        really, left = write.Part.write, [times]

        def write_or_not(part, aside, image=None):
            if left[0] and int(aside.name.removesuffix(".aside").removeprefix(".step-")) in steps:
                left[0] -= 1
                raise OSError(errno.ENOSPC, "No space left on device", f"{aside}/pieces-{rank:05d}.safetensors")
            really(part, aside, image)

        write.Part.write = write_or_not

    return patch


def failures_in(run: Path) -> dict[int, int]:
    """The number of failed saves by the step in whose record it is told."""
    records = runs.lines(run / "metrics.jsonl")
    return {r["step"]: r["checkpoint_failed"] for r in records if "checkpoint_failed" in r}


def assert_same_but_for_failures(run: Path, unbroken: Path) -> None:
    found, expected = runs.story(run), runs.story(unbroken)
    for record in found["metrics"]:
        record.pop("checkpoint_failed", None)
    runs.assert_same_story({**found, "checkpoints": []}, {**expected, "checkpoints": []})


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_saves_that_fail_in_mid_run_are_told_and_the_run_ends_as_if_they_had_not(config, tmp_path, ranks, rank):
    run = tmp_path / "run"
    told = runs.trained(config, before=failing(10, 15, rank=rank), ranks=ranks)
    assert sorted(failures_in(run).values()) == [1, 2] and min(failures_in(run)) > 10
    lines = [line for line in told.splitlines() if "could not be written" in line]
    assert len(lines) == 2
    file = f"{run}/checkpoints/.step-00000010.aside/pieces-0000{rank}.safetensors"
    assert f"rank {rank}: {file}: No space left on device" in lines[0]
    assert lines[0].endswith("of the checkpoints before, step-00000005 stands") and " E " in lines[0]
    assert lines[1].endswith("of the checkpoints before, step-00000012 stands")
    there = [f"step-{step:08d}" for step in (5, 12, 20, 24)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *there]
    runs.trained(config, f"output={tmp_path / 'unbroken'}", ranks=ranks)
    assert_same_but_for_failures(run, tmp_path / "unbroken")


def test_after_a_failed_save_the_run_can_be_taken_up_from_the_checkpoint_before(config, tmp_path):
    run = tmp_path / "run"

    def fail_and_die() -> None:
        failing(10)()
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_and_die(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            if "checkpoint_failed" in record:
                os._exit(9)

        Journal.step = tell_and_die

    with pytest.raises(AssertionError, match=r"ended with \[9\]"):
        runs.cpt("train", config, before=fail_and_die)
    assert find_checkpoint(run / "checkpoints").state["progress"]["step"] == 5
    assert "going on from" in runs.trained(config)
    runs.trained(config, f"output={tmp_path / 'unbroken'}")
    assert_same_but_for_failures(run, tmp_path / "unbroken")


def test_the_last_save_is_tried_once_more(config, tmp_path):
    told = runs.trained(config, before=failing(24, times=1))
    assert "step-00000024 could not be written" in told and "step-00000020 stands" in told
    assert (tmp_path / "run" / "finished.json").is_file()
    assert find_checkpoint(tmp_path / "run" / "checkpoints").state["progress"]["step"] == 24


def refusing_latest_once(step: int) -> Callable[[], None]:
    """For `before`: the first save after `step` appears, and `latest` cannot be made to name it."""

    def patch() -> None:
        from cpt.checkpoint import run_folder

        really, left = run_folder.set_latest, [1]

        def set_latest(checkpoints, folder):
            if folder.name == f"step-{step:08d}" and left[0]:
                left[0] -= 1
                raise OSError(errno.EACCES, "Permission denied", f"{checkpoints}/latest")
            really(checkpoints, folder)

        run_folder.set_latest = set_latest

    return patch


@pytest.mark.parametrize("step", [10, 24])
def test_a_checkpoint_that_stands_but_is_not_settled_is_told_as_such(config, tmp_path, step):
    told = runs.trained(config, before=refusing_latest_once(step), ranks=2)
    run = tmp_path / "run"
    assert f"step-{step:08d} is written, but latest, older checkpoints or ledger.json" in told
    assert f"rank 0: {run}/checkpoints/latest: Permission denied" in told and "could not be written" not in told
    assert (run / "finished.json").is_file()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest", *(f"step-{number:08d}" for number in (5, 10, 12, 15, 20, 24)),
    ]  # fmt: skip
    assert find_checkpoint(run / "checkpoints").state["progress"]["step"] == 24


def test_one_whose_name_is_perhaps_not_on_the_disk_yet_is_told_as_there(config, tmp_path):
    run = tmp_path / "run"

    def before() -> None:
        really, left = os.fsync, [1]

        def fsync(handle):
            is_around = Path(f"/proc/self/fd/{handle}").readlink() == run / "checkpoints"
            if is_around and left[0] and (run / "checkpoints" / "step-00000010").exists():
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            really(handle)

        os.fsync = fsync

    told = runs.trained(config, before=before)
    assert f"step-00000010 is written, but latest, older checkpoints or ledger.json are not: rank 0: {run}/" in told
    assert "could not be written" not in told
    assert find_checkpoint(run / "checkpoints", 10).state["progress"]["step"] == 10


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_between_the_renames_of_a_step_that_is_saved_again_the_run_goes_on_from_that_step(
    config, tmp_path, ranks
):
    """The only checkpoint, that of a stop, is whole but not settled, so it is saved once more."""
    run = tmp_path / "run"

    def before() -> None:
        refusing_latest_once(3)()
        runs.ask_to_stop_at(2)()
        replace = Path.replace

        def replace_or_die(path: Path, target: Path) -> Path:
            if target == run / "checkpoints" / "step-00000003" and path.with_name(".step-00000003.old.aside").exists():
                os._exit(9)
            return replace(path, target)

        Path.replace = replace_or_die

    with pytest.raises(AssertionError, match=r"ended with \[9"):
        runs.cpt("train", config, before=before, ranks=ranks)
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert there == [".step-00000003.aside", ".step-00000003.old.aside"]
    told = runs.trained(config, ranks=ranks)
    assert f"going on from {run}/checkpoints/step-00000003" in told
    runs.trained(config, f"output={tmp_path / 'unbroken'}", ranks=ranks)
    assert_same_but_for_failures(run, tmp_path / "unbroken")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_last_save_that_fails_twice_ends_the_run_on_all_ranks_with_a_line_and_it_can_go_on(config, tmp_path, stopped):
    run, last = tmp_path / "run", 18 if stopped else 24

    def before() -> None:
        failing(last, rank=1)()
        if stopped:
            runs.ask_to_stop_at(last - 1)()

    ended = runs.cpt("train", config, ranks=2, before=before, seconds=40)
    assert [status for status, _ in ended] == [1, 1]
    for _, told in ended:
        assert f"step-{last:08d} could not be written: rank 1: " in told.splitlines()[-1] and "Traceback" not in told
    assert not (run / "finished.json").exists()
    assert f"going on from {run}/checkpoints/step-000000{15 if stopped else 20}" in runs.trained(config, ranks=2)


def test_in_the_foreground_the_first_failure_ends_the_run(config, tmp_path):
    ended = runs.cpt("train", config, "checkpoint.in_background=false", ranks=2, before=failing(10, rank=1), seconds=40)
    assert [status for status, _ in ended] == [1, 1]
    assert all("step-00000010 could not be written: rank 1" in told.splitlines()[-1] for _, told in ended)
    assert all("Traceback" not in told for _, told in ended)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == ["latest", "step-00000005"]


def test_too_little_room_is_told_at_the_start_and_a_save_without_room_fails(config, tmp_path):
    run = tmp_path / "run"

    def fill_disk() -> None:
        import shutil

        shutil.disk_usage = lambda _: type("Usage", (), {"free": 1000})()

    ((status, told),) = runs.cpt("train", config, before=fill_disk)
    assert status == 1 and "the disk lacks" in told and "saves will fail when it is full" in told
    assert "1,000 are free on this disk; nothing was written" in told and "none stands so far" in told
    assert list((run / "checkpoints").iterdir()) == []
    assert failures_in(run) == {6: 1, 11: 2, 13: 3, 16: 4, 21: 5}
    told = runs.trained(config)
    assert "was begun but never saved; beginning again" in told and "the disk lacks" not in told


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_what_was_there_when_it_was_due(config, tmp_path, ranks):
    run, waited = tmp_path / "run", tmp_path / "waited"

    def hold_until_step_9() -> None:
        from cpt.checkpoint import write
        from cpt.observe.journal import Journal

        hold, really, tell = threading.Event(), write.Part.write, Journal.step

        def write_late(*arguments):
            assert hold.wait(30)
            really(*arguments)

        def tell_and_release(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            if record["step"] == 9:
                assert not (run / "checkpoints" / "step-00000005").exists()
                hold.set()

        write.Part.write, Journal.step = write_late, tell_and_release

    told = runs.trained(config, before=hold_until_step_9, ranks=ranks)
    assert "copied step 5 in" in told
    runs.trained(config, f"output={waited}", "checkpoint.in_background=false", ranks=ranks)
    for step in (5, 10, 12, 15, 20, 24):
        ours, theirs = (find_checkpoint(folder / "checkpoints", step) for folder in (run, waited))
        assert ours.state == theirs.state and ours.kinds == theirs.kinds
        for name in [path.name for path in ours.folder.iterdir()]:
            assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes(), (step, name)
    runs.assert_same_story(runs.story(run), runs.story(waited))


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_was_still_being_written(config, tmp_path):
    def spoil() -> None:
        import time

        from cpt.checkpoint import write
        from cpt.engine import Engine

        really, step = write.Part.write, Engine.step

        def write_slowly(*arguments):
            time.sleep(0.5)
            really(*arguments)

        def spoiled(engine, tokens, sources, num_sources, rate, progress, *others):
            if progress.step == 6:
                engine.masters.pieces[0].values.fill_(float("nan"))
            return step(engine, tokens, sources, num_sources, rate, progress, *others)

        write.Part.write, Engine.step = write_slowly, spoiled

    ((status, told),) = runs.cpt("train", config, before=spoil)
    assert status == 1 and "The last checkpoint saved is that of step 5; go on from it" in told.splitlines()[-1]


DAMAGED_LATEST = [b"", b"\xff\xfe", b"step-0000000x\n", b"step-00000004\n", b"../checkpoints\n"]


@pytest.mark.parametrize("content", DAMAGED_LATEST)
def test_a_latest_that_names_no_checkpoint_hides_no_message_and_the_way_on_is_to_look(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.checkpoint_at(5).mkdir(parents=True)
    (folder.checkpoints / "latest").write_bytes(content)
    way_on = Saving(Settings(), ALONE, folder, lambda state: None).way_on()
    assert f"{folder.checkpoints}/latest names no checkpoint that is there" in way_on
    assert f"cpt checkpoint verify {tmp_path}" in way_on and "in a child run with a lower learning rate" in way_on


def test_a_save_that_fails_while_latest_is_damaged_is_told_and_the_next_one_mends_it(config, tmp_path):
    latest = tmp_path / "run" / "checkpoints" / "latest"

    def before() -> None:
        failing(10)()
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_and_damage(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            if record["step"] == 9:
                latest.write_bytes(b"\xff")

        Journal.step = tell_and_damage

    told = runs.trained(config, before=before)
    (line,) = [line for line in told.splitlines() if "could not be written" in line]
    assert line.endswith(f"of the checkpoints before, {latest} names no checkpoint that is there")
    assert latest.read_text() == "step-00000024\n"


class FullDisk:
    """Takes a few bytes more of a file, and then nothing."""

    def __init__(self, file) -> None:
        self.file, self._room = file, 7

    def write(self, data: bytes) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self._room = self.file.write(data[: self._room]), 0
        return taken

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def full_disk_between(first: int, last: int) -> Callable[[], None]:
    """For `before`: from step `first` to `last` the disk does not take the lines of the first rank."""

    def patch() -> None:
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_on_full_disk(journal, record, num_tokens):
            for records in journal._files.values():
                if record["step"] == first:
                    records._file = FullDisk(records._file)
                if record["step"] == last:
                    records._file = records._file.file
            tell(journal, record, num_tokens)

        Journal.step = tell_on_full_disk

    return patch


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_holds_back_lines_and_saves_and_the_run_ends_as_if_it_had_not_been_full(config, tmp_path, ranks):
    run = tmp_path / "run"
    told = runs.trained(config, before=full_disk_between(8, 14), ranks=ranks)
    assert told.count("metrics.jsonl: No space left on device; its lines are kept in memory") == 1
    assert f"step-00000010 could not be written: rank 0: {run}/metrics.jsonl: No space left on device" in told
    assert set(failures_in(run).values()) == {1, 2}
    runs.trained(config, f"output={tmp_path / 'unbroken'}", ranks=ranks)
    assert_same_but_for_failures(run, tmp_path / "unbroken")


def test_a_disk_that_is_full_to_the_end_ends_the_run_with_a_line_and_it_can_go_on(config, tmp_path):
    run = tmp_path / "run"
    ended = runs.cpt("train", config, ranks=2, before=full_disk_between(21, 99), seconds=40)
    assert [status for status, _ in ended] == [1, 1]
    assert "step-00000024 could not be written" in ended[0][1].splitlines()[-1]
    assert not (run / "finished.json").exists()
    runs.trained(config, ranks=2)
    runs.trained(config, f"output={tmp_path / 'unbroken'}", ranks=2)
    assert_same_but_for_failures(run, tmp_path / "unbroken")
