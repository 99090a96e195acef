"""Stopped at any instant and started again by the same command, a run ends as if it had not been stopped."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
from cpt_harness import runs
from cpt_harness.ranks import RankError

from cpt.checkpoint import find_checkpoint

FIRST, SECOND = 40, 30  # steps of the two stages
SAVED_EVERY = 13
ENDLESS = 100_000  # steps: a signal can never come too late


def write_config(data, folder: Path, num_steps_of_second: int) -> Path:
    """Two stages, the second with replay of the first; Reptile with windows that fit neither stage nor checkpoint."""
    stages = [
        runs.stage(data, "prose", FIRST),
        runs.stage(
            data, "code", num_steps_of_second, replay={"share": 0.25}, schedule={"name": "rewarm", "peak": 3e-3}
        ),
    ]
    plain = runs.settings(
        data, folder / "unbroken", stages,
        checkpoint={"every_tokens": SAVED_EVERY * runs.TOKENS_A_STEP},
        methods=[{"name": "reptile", "every": 7, "step_size": 0.6}],
    )  # fmt: skip
    plain["evaluation"]["every_tokens"] = 20 * runs.TOKENS_A_STEP
    return runs.write_settings(folder / "run.yaml", plain)


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return write_config(data, tmp_path_factory.mktemp("interrupted"), SECOND)


@pytest.fixture(scope="module")
def endless(data, tmp_path_factory) -> Path:
    return write_config(data, tmp_path_factory.mktemp("endless"), ENDLESS)


@pytest.fixture(scope="module")
def unbroken(config) -> dict:
    runs.trained(config)
    return runs.story(config.parent / "unbroken")


def last_step(run: Path) -> int:
    return runs.lines(run / "metrics.jsonl")[-1]["step"]


# ---- real signals to a real process


@pytest.mark.parametrize(
    ("number", "status", "from_step"), [(signal.SIGTERM, 143, 17), (signal.SIGINT, 130, FIRST + 13)], ids=str
)
def test_a_signal_saves_first_and_the_same_command_goes_on(endless, tmp_path, number, status, from_step):
    run = tmp_path / "run"
    process = runs.start(endless, f"output={run}", folder=tmp_path)
    runs.wait_for_step(run, from_step, process)
    process.send_signal(number)
    assert runs.end(process) == status
    stopped_at = last_step(run)
    assert stopped_at >= from_step
    assert find_checkpoint(run / "checkpoints").state["progress"]["step"] == stopped_at
    assert f"asked to stop: saved at step {stopped_at}" in (tmp_path / "out.txt").read_text()
    told = assert_goes_on_as_if_unbroken(endless, run, tmp_path / "unbroken")
    assert f"going on from {run}/checkpoints/step-{stopped_at:08d}: step {stopped_at}, " in told


def assert_goes_on_as_if_unbroken(config: Path, run: Path, unbroken: Path) -> str:
    """Five steps more, and everything is as in a run that came there without a stop; what was told on the way."""
    until = runs.ask_to_stop_at(last_step(run) + 4)
    ((status, told),) = runs.cpt("train", config, f"output={run}", before=until)
    runs.cpt("train", config, f"output={unbroken}", before=until)
    assert status == 143
    runs.assert_same_but_for_checkpoints(runs.story(run), runs.story(unbroken))
    return told


def test_killed_at_any_time_with_torn_last_lines_it_goes_on_from_its_last_checkpoint(endless, tmp_path):
    run = tmp_path / "run"
    for from_step in (3, 2 * SAVED_EVERY + 3):  # before the first checkpoint, and after the second
        process = runs.start(endless, f"output={run}", folder=tmp_path)
        runs.wait_for_step(run, from_step, process)
        process.kill()
        assert runs.end(process) == -signal.SIGKILL
        for name in ("metrics", "scores", "order"):
            text = (run / f"{name}.jsonl").read_bytes()
            whole = text[: text.rindex(b"\n") + 1]
            (run / f"{name}.jsonl").write_bytes(whole + b'{"step": 61, "stage": "pro\xc3')
    saved_at = find_checkpoint(run / "checkpoints").state["progress"]["step"]
    until = runs.ask_to_stop_at(saved_at + SAVED_EVERY)
    ((_, told),) = runs.cpt("train", endless, f"output={run}", before=until)
    assert f"going on from {run}/checkpoints/step-{saved_at:08d}" in told
    runs.cpt("train", endless, f"output={tmp_path / 'unbroken'}", before=until)
    runs.assert_same_story(runs.story(run), runs.story(tmp_path / "unbroken"))


def test_the_second_stages_learning_rate_rises_from_where_the_firsts_ended(unbroken):
    rates = [record["learning_rate"] for record in unbroken["metrics"]]
    assert rates[FIRST] == rates[FIRST - 1] and max(rates[FIRST:]) == rates[FIRST + 1] == pytest.approx(3e-3, rel=1e-2)


# ---- a stop at a chosen step


@pytest.mark.parametrize("step", [1, FIRST - 2, FIRST - 1, FIRST, FIRST + SECOND - 2])
def test_a_stop_near_the_ends_of_stages_is_saved_one_step_later_and_gone_on_with(config, unbroken, tmp_path, step):
    run = tmp_path / "run"
    ((status, told),) = runs.cpt("train", config, f"output={run}", before=runs.ask_to_stop_at(step))
    assert status == 143 and f"saved at step {step + 1}" in told
    assert last_step(run) == step + 1 and not (run / "finished.json").exists()
    runs.trained(config, f"output={run}")
    runs.assert_same_but_for_checkpoints(runs.story(run), unbroken)


@pytest.mark.parametrize("step", [FIRST + SECOND - 1, FIRST + SECOND])
def test_a_stop_that_comes_with_the_last_step_lets_the_run_end(config, unbroken, tmp_path, step):
    run = tmp_path / "run"
    runs.trained(config, f"output={run}", before=runs.ask_to_stop_at(step))
    assert (run / "finished.json").exists()
    runs.assert_same_story(runs.story(run), unbroken)


@pytest.mark.parametrize(
    ("ranks", "words"), [(2, []), (1, ["zero=3"]), (2, ["zero=2", "batch.micro_batch=1"])], ids=str
)
def test_gone_on_with_on_another_mesh_the_windows_are_the_same_and_the_losses_to_rounding(
    config, unbroken, tmp_path, ranks, words
):
    run = tmp_path / "run"
    runs.cpt("train", config, f"output={run}", before=runs.ask_to_stop_at(FIRST + 9))
    runs.trained(config, f"output={run}", *words, ranks=ranks)
    found = runs.story(run)
    assert found["order"] == unbroken["order"] and found["ledger"] == unbroken["ledger"]
    assert len(found["metrics"]) == len(unbroken["metrics"])
    for mine, other in zip(found["metrics"], unbroken["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5), mine["step"]
        assert mine["learning_rate"] == other["learning_rate"] and mine["tokens"] == other["tokens"]
    for mine, other in zip(found["scores"], unbroken["scores"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["interval"] == pytest.approx(other["interval"], abs=1e-5)
        rounded = dict.fromkeys(("loss", "bits_per_byte", "interval"), 0)
        assert {**mine, **rounded} == {**other, **rounded}


@pytest.mark.parametrize(("step", "ranks"), [(19, 1), (FIRST - 1, 2), (FIRST + SECOND - 1, 1)])
def test_a_stop_where_an_evaluation_is_due_saves_first_and_the_evaluation_is_made_once_on_going_on(
    config, unbroken, tmp_path, step, ranks
):
    """In mid-stage, at a stage's end, at the run's; killed as soon as the checkpoint stands, or in that evaluation."""
    run = tmp_path / "run"

    def killed_in_evaluation(num_scored: int) -> None:
        from cpt.run.scoring import Scoring

        score = Scoring._score

        def score_or_die(scoring, progress, *others, **named):
            if progress.step == step + 1:
                scoring.held_out = dict(list(scoring.held_out.items())[:num_scored])
                score(scoring, progress, *others, **named)
                os._exit(9)
            return score(scoring, progress, *others, **named)

        Scoring._score = score_or_die

    def stop_and_die() -> None:
        runs.ask_to_stop_at(step)()
        killed_in_evaluation(0)

    if step + 1 == FIRST + SECOND:  # the run ends there, so that the evaluation comes in this process, but last
        with pytest.raises(RankError, match=r"ended with \[9\]"):
            runs.cpt("train", config, f"output={run}", before=stop_and_die)
    else:
        ended = runs.cpt("train", config, f"output={run}", before=stop_and_die, ranks=ranks)
        assert [status for status, _ in ended] == [143] * ranks
    assert find_checkpoint(run / "checkpoints").state["progress"]["step"] == step + 1
    assert step + 1 not in {record["step"] for record in runs.lines(run / "scores.jsonl")}
    if ranks == 1:
        with pytest.raises(RankError, match=r"ended with \[9\]"):
            runs.cpt("train", config, f"output={run}", before=lambda: killed_in_evaluation(1))
    runs.trained(config, f"output={run}", ranks=ranks)
    names = ("step", "source", "stage", "stage_end")
    found, expected = ([[r[name] for name in names] for r in s["scores"]] for s in (runs.story(run), unbroken))
    assert found == expected
    if ranks == 1:
        runs.assert_same_but_for_checkpoints(runs.story(run), unbroken)


# ---- an end at every point where something is written


def die_at(point: int):
    """What makes a process die at its `point`-th act on the disk: the first half of a file is written, or nothing."""

    def patch() -> None:
        import cpt.checkpoint.write as write

        acts = itertools.count()

        def dying(act, half=None):
            def do(*arguments, **named):
                if next(acts) == point:
                    if half:
                        half(*arguments, **named)
                    os._exit(9)
                return act(*arguments, **named)

            return do

        write_text = Path.write_text
        Path.write_text = dying(
            Path.write_text, lambda path, text, **named: write_text(path, text[: len(text) // 2], **named)
        )
        for owner, name in ((Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (shutil, "copytree"),
                            (os, "fsync"), (write.Part, "write")):  # fmt: skip
            setattr(owner, name, dying(getattr(owner, name)))

    return patch


def num_acts(words: list) -> int:
    """How many acts on the disk a whole run makes."""
    low, high = 0, 1000
    while low < high:
        middle = (low + high) // 2
        try:
            runs.cpt("train", *words, f"output={words[0].parent / f'count-{middle}'}", before=die_at(middle))
            high = middle
        except RankError:
            low = middle + 1
    return low


@pytest.fixture(scope="module")
def short(data, base, tmp_path_factory) -> tuple[Path, dict, int]:
    """A child of four steps in two stages that saves at every second one; its story; its number of acts."""
    folder = tmp_path_factory.mktemp("short")
    stages = [runs.stage(data, "code", 2), runs.stage(data, "both", 2, "prose", replay={"share": 0.5})]
    plain = runs.settings(
        data, folder / "unbroken", stages, parent={"run": str(base)}, methods=["reptile"],
        checkpoint={"every_tokens": runs.TOKENS_A_STEP, "keep_last": 1},
    )  # fmt: skip
    config = runs.write_settings(folder / "run.yaml", plain)
    runs.trained(config)
    return config, runs.story(folder / "unbroken"), num_acts([config])


def test_died_at_any_act_on_the_disk_a_run_is_begun_again_or_gone_on_with_and_ends_the_same(short, tmp_path):
    config, unbroken, number = short
    assert number > 50
    for point in range(0, number, 7):
        run = tmp_path / f"died-{point}"
        with pytest.raises(RankError, match=r"ended with \[9\]"):
            runs.cpt("train", config, f"output={run}", before=die_at(point))
        runs.trained(config, f"output={run}")
        there = sorted(path.name for path in run.rglob("*"))
        assert there == sorted(path.name for path in (config.parent / "unbroken").rglob("*")), point
        runs.assert_same_story(runs.story(run), unbroken)


@pytest.mark.parametrize("num_written", [1, 3])
def test_died_between_two_lines_of_one_evaluation_it_is_written_whole_once(base, data, tmp_path, num_written):
    def die_while_scoring() -> None:
        from cpt.observe.records import Records

        write = Records.write

        def dying(records, record):
            nonlocal num_written
            if "bits_per_byte" in record:
                if num_written == 0:
                    os._exit(9)
                num_written -= 1
            write(records, record)

        Records.write = dying

    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 8)], parent={"run": str(base)})
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with pytest.raises(RankError, match=r"ended with \[9\]"):
        runs.cpt("train", config, before=die_while_scoring)
    runs.trained(config)
    told = [(record["step"], record["source"]) for record in runs.lines(tmp_path / "run" / "scores.jsonl")]
    assert told == [(step, source) for step in (0, 7, 8) for source in ("prose", "code")]
