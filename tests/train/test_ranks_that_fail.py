"""What one rank alone cannot do is told, by that rank, and the others do not wait for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from cpt_harness import runs
from cpt_harness.ranks import RankError

from cpt.config import Fault
from cpt.observe.attempts import note_attempt, read_attempts


@pytest.fixture
def config(data, tmp_path) -> Path:
    return runs.write_settings(
        tmp_path / "run.yaml", runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 8)])
    )


def is_rank(number: int) -> bool:
    return int(os.environ["RANK"]) == number


def test_a_fault_that_one_rank_finds_in_mid_run_is_told_by_it_and_kept_in_its_log(config, tmp_path):
    def before() -> None:
        from cpt.data.loader import Loader

        really, left = Loader.batch, [3]

        def batch(loader, *arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Fault(["ids beyond the model's vocabulary", "and a second line"])
            return really(loader, *arguments)

        if is_rank(1):
            os.dup2(os.open(tmp_path / "told", os.O_WRONLY | os.O_CREAT), 2)
            Loader.batch = batch

    with pytest.raises(RankError):  # the first rank, whose sum is cut off, has a traceback
        runs.cpt("train", config, ranks=2, before=before, seconds=40)
    lines = ["ids beyond the model's vocabulary", "and a second line"]
    assert (tmp_path / "told").read_text().splitlines() == [f"cpt train: rank 1: {line}" for line in lines]
    kept = (tmp_path / "run" / "logs" / "rank-00001.log").read_text().splitlines()[-2:]
    assert [line.split(" ERROR cpt ")[1] for line in kept] == lines


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a/file")


def wrong(*_: object, **__: object) -> None:
    raise Fault("this cannot work")


@pytest.mark.parametrize(
    ("where", "rank", "does", "status", "told"),
    [
        ("refuse_other_contents", 1, wrong, 1, "rank 1: this cannot work"),  # of its machine: it may pass
        ("refuse_bad_stages", 0, wrong, 2, "this cannot work"),
        ("open_corpora", 1, wrong, 1, "rank 1: this cannot work"),
        ("write_yaml", 0, full_disk, 1, "a/file: No space left on device"),
        ("log_to_file", 1, full_disk, 1, "a/file: No space left on device"),
        ("Journal", 0, full_disk, 1, "a/file: No space left on device"),
    ],
)
def test_what_one_rank_cannot_prepare_ends_all_with_one_message(config, where, rank, does, status, told):
    def before() -> None:
        import cpt.train
        from cpt.run import opening

        if is_rank(rank):
            setattr(next(one for one in (cpt.train, opening, cpt.train.RunFolder) if hasattr(one, where)), where, does)

    ended = runs.cpt("train", config, ranks=2, before=before, seconds=40)
    assert [status for status, _ in ended] == [status, status]
    assert ended[rank][1].splitlines()[-1] == f"cpt train: {told}"
    assert "cpt train:" not in ended[1 - rank][1] and "Traceback" not in ended[0][1] + ended[1][1]


def test_where_a_run_was_launched_a_fault_of_one_machine_is_noted_as_an_end_that_may_pass(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    note_attempt(run, "launched")

    def before() -> None:
        import cpt.train

        if is_rank(1):
            cpt.train.open_corpora = wrong

    ended = runs.cpt("train", config, ranks=2, before=before, seconds=40)
    assert [status for status, _ in ended] == [1, 1]
    (told,) = [event for event in read_attempts(run) if event["event"] == "ended"]
    assert (told["how"], told["reason"], told["rank"]) == ("failed", "this cannot work", 1)
    assert told["is_final"] is False


def test_a_folder_that_cannot_be_made_is_told_once_and_ends_all_ranks(config, tmp_path):
    (tmp_path / "file").write_text("")
    ended = runs.cpt("train", config, f"output={tmp_path}/file/run", ranks=2, seconds=40)
    assert [status for status, _ in ended] == [2, 2]
    assert ended[0][1].splitlines()[-1].startswith(f"cpt train: output = {tmp_path}/file/run: the folder cannot be")
    assert ended[1][1] == ""


def test_where_the_windows_of_a_bad_step_cannot_be_written_the_reason_for_the_end_is_told_all_the_same(config):
    def before() -> None:
        from cpt.engine import Engine

        step, opened = Engine.step, Path.open

        def spoiled(engine, tokens, sources, num_sources, rate, progress, *others):
            if progress.step == 2:
                engine.masters.pieces[0].values.fill_(float("nan"))
            return step(engine, tokens, sources, num_sources, rate, progress, *others)

        def open_file(path, *how, **named):
            return full_disk() if path.parent.name == "autopsy" else opened(path, *how, **named)

        Engine.step, Path.open = spoiled, open_file

    ended = runs.cpt("train", config, ranks=2, before=before, seconds=40)
    assert [status for status, _ in ended] == [1, 1]
    assert "not finite" in ended[0][1].splitlines()[-1] and "No space left on device" in ended[0][1]
    assert '"first_token"' in ended[0][1] or "'first_token'" in ended[0][1]


def test_a_checkpoint_that_no_rank_finds_is_told_once(data, base, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 3)], parent={"run": str(base), "at": 3})
    ended = runs.cpt("train", runs.write_settings(tmp_path / "run.yaml", plain), ranks=2, seconds=40)
    assert [status for status, _ in ended] == [2, 2]
    assert "there is no checkpoint at step 3; there are: 15, 20" in ended[0][1] and ended[1][1] == ""
