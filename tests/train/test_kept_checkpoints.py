"""Which checkpoints a run leaves: the last few, those kept for ever, and a temporary one by the first rank's clock."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.checkpoint import find_checkpoint

STEP = runs.TOKENS_A_STEP


@pytest.fixture
def config(data, tmp_path) -> Path:
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 27)], checkpoint={"keep_last": 1})
    return runs.write_settings(tmp_path / "run.yaml", plain)


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_checkpoints_at_or_past_each_multiple_are_saved_and_stay(config, tmp_path):
    """Multiples of 6.5 steps are first passed at steps 7, 13, 20 and 26; steps 5, 10, 15 ... are regular ones."""
    words = [f"checkpoint.keep_every_tokens={13 * STEP // 2}", f"checkpoint.every_tokens={5 * STEP}"]
    runs.cpt("train", config, *words, before=runs.ask_to_stop_at(16))
    assert steps_in(tmp_path / "run") == [7, 13, 17]
    runs.trained(config, *words)
    assert steps_in(tmp_path / "run") == [7, 13, 20, 26, 27]
    marks = {step: find_checkpoint(tmp_path / "run" / "checkpoints", step).state for step in (13, 27)}
    assert marks[13]["kept_for_ever"] is True and "kept_for_ever" not in marks[27]


def unreadable(step: int) -> Callable[[], None]:
    """For `before`: the disk does not give the files of that checkpoint."""

    def patch() -> None:
        from cpt.checkpoint import damage

        give = damage.checksum

        def checksum(path, *more):
            if path.parent.name == f"step-{step:08d}":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return give(path, *more)

        damage.checksum = checksum

    return patch


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_that_a_disk_did_not_give_is_put_by_until_the_run_has_saved_that_step_anew(config, tmp_path, ranks):
    run = tmp_path / "run"
    words = [f"checkpoint.every_tokens={5 * STEP}", "checkpoint.keep_last=2", "checkpoint.in_background=false"]

    def going_on(until: int) -> str:
        def before() -> None:
            unreadable(19)()
            runs.ask_to_stop_at(until)()

        return runs.cpt("train", config, *words, before=before, ranks=ranks)[0][1]

    going_on(18)
    assert names_in(run) == ["step-00000015", "step-00000019"]
    told = going_on(16)
    assert "step-00000019/" in told and f"going on from {run}/checkpoints/step-00000015" in told
    assert "may be whole: it is kept as" in told
    assert names_in(run) == ["step-00000015", "step-00000017", "step-00000019-unread"]
    told = runs.trained(config, *words, ranks=ranks)
    assert f"going on from {run}/checkpoints/step-00000017" in told, "what was put by is not gone on from"
    assert names_in(run) == ["step-00000025", "step-00000027"]
    runs.trained(config, f"output={tmp_path / 'unbroken'}", *words, ranks=ranks)
    runs.assert_same_story(runs.story(run), runs.story(tmp_path / "unbroken"))


def test_checkpoints_at_or_past_named_places_are_saved_and_stay(config, tmp_path):
    runs.trained(config, f"checkpoint.keep_at_tokens=[{13 * STEP // 2},{9 * STEP}]", "stages.0.tokens=1200")
    assert steps_in(tmp_path / "run") == [7, 9, 13]
    assert find_checkpoint(tmp_path / "run" / "checkpoints", 9).state["kept_for_ever"] is True


def test_a_place_before_the_first_token_is_refused(config):
    ((status, told),) = runs.cpt("train", config, "checkpoint.keep_at_tokens=[0]")
    assert (status, "checkpoint.keep_at_tokens: 0: at least 1" in told) == (2, True)


def clock_of_steps() -> None:
    """Time on the first rank goes by a minute a step; on others by a year, backwards."""
    import cpt.run.saving as saving
    from cpt.engine import Engine

    step, now = Engine.step, [0.0]
    pace = 60.0 if os.environ.get("RANK", "0") == "0" else -3e7

    def counted(*arguments):
        result = step(*arguments)
        now[0] += pace
        return result

    Engine.step = counted
    saving.time = type("Clock", (), {"monotonic": lambda: now[0], "perf_counter": lambda: 0.0})


def seen_before_each_step(run: Path, seen: Path) -> None:
    """For `before`: the checkpoints that lie there when a step is told, which is before it is saved, a line a step."""
    from cpt.observe.journal import Journal

    tell = Journal.step

    def tell_and_look(journal, record, num_tokens):
        tell(journal, record, num_tokens)
        if os.environ.get("RANK", "0") == "0":
            with seen.open("a") as file:
                print(record["step"], *steps_in(run), file=file)

    Journal.step = tell_and_look


@pytest.mark.parametrize("ranks", [1, 2])
def test_temporary_ones_are_saved_by_the_first_ranks_clock_and_go_when_another_is_there(config, tmp_path, ranks):
    """Two minutes of a minute a step, so at the third step after the last save; regular ones at 10 and 20."""
    run, seen = tmp_path / "run", tmp_path / "seen"

    def before() -> None:
        clock_of_steps()
        seen_before_each_step(run, seen)

    words = ["checkpoint.temporary_every_minutes=2", f"checkpoint.every_tokens={10 * STEP}"]
    runs.trained(config, *words, "checkpoint.in_background=false", before=before, ranks=ranks)
    there = dict.fromkeys(range(1, 4), [])
    for first, last, steps in ((4, 6, [3]), (7, 9, [6]), (10, 10, [9]), (11, 13, [10]), (14, 16, [10, 13]),
                               (17, 19, [10, 16]), (20, 20, [10, 19]), (21, 23, [20]), (24, 26, [20, 23]),
                               (27, 27, [20, 26])):  # fmt: skip
        there.update(dict.fromkeys(range(first, last + 1), steps))
    found = [list(map(int, line.split())) for line in seen.read_text().splitlines()]
    assert {step: steps for step, *steps in found} == there
    assert steps_in(run) == [27]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_from_a_temporary_one_as_if_it_had_not_been_stopped(config, tmp_path, ranks):
    def before() -> None:
        clock_of_steps()
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_and_die(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            if record["step"] == 9:
                os._exit(9)

        Journal.step = tell_and_die

    words = ["checkpoint.temporary_every_minutes=2.5"]
    with pytest.raises(AssertionError, match=r"ended with \[9"):
        runs.cpt("train", config, *words, before=before, ranks=ranks)
    (step,) = steps_in(tmp_path / "run")
    assert step in (4, 8) and find_checkpoint(tmp_path / "run" / "checkpoints").state["temporary"] is True
    assert f"going on from {tmp_path}/run/checkpoints/step-0000000{step}" in runs.trained(config, *words, ranks=ranks)
    runs.trained(config, f"output={tmp_path / 'unbroken'}", ranks=ranks)
    runs.assert_same_story(runs.story(tmp_path / "run"), runs.story(tmp_path / "unbroken"))
