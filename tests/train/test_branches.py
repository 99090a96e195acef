"""A branch leaves the main path, sees the windows that the path sees, and the path goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cpt_harness import runs

from cpt.checkpoint import Checkpoint, Place, RunFolder
from cpt.config import Fault
from cpt.lineage import chain
from cpt.progress import Progress
from cpt.run import read_run
from cpt.run.beginning import checkpoint_of_parent, place_of_child
from cpt.run.stages import order_of

STEP = runs.TOKENS_A_STEP
FLAT = {"name": "constant", "peak": 5e-3, "warmup": 3 * STEP}


def path_settings(data: Path, output: Path, **more) -> Path:
    """A main path: prose and some code for 8 steps, then code with replay for 12; saved every 5."""
    both = {name: {"corpus": str(data / name), "share": share} for name, share in (("prose", 0.7), ("code", 0.3))}
    replay = {"share": 0.25, "scope": "all_seen", "accounting": "adds_to_new"}
    stages = [
        runs.stage(data, "old", 8, "prose", schedule=FLAT, sources=both),
        runs.stage(data, "new", 9, "code", schedule={"name": "constant", "peak": 5e-3}, replay=replay),
    ]
    plain = runs.settings(data, output, stages, **{"checkpoint": {"every_tokens": 5 * STEP, "keep_last": 9}, **more})
    return runs.write_settings(output.parent / f"{output.name}.yaml", plain)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory) -> Path:
    """A finished main path of 20 steps."""
    output = tmp_path_factory.mktemp("paths") / "path"
    runs.trained(path_settings(data, output))
    return output


def branched(path: Path, at: int | str, steps: float, output: Path, *words: object, **named) -> str:
    """What `cpt branch` said on standard error; fails unless it ended with 0."""
    ((status, told),) = runs.cpt(
        "branch", path, "--at", at, "--tokens", int(steps * STEP), "--output", output, *words, **named
    )
    assert status == 0, told
    return told


def refused(path: Path, *words: object) -> str:
    ((status, told),) = runs.cpt("branch", path, *words)
    assert status == 2, told
    return told


def identities(run: Path, first_step: int, num_steps: int) -> list[tuple[str, int, int]]:
    """The windows of steps of a run, all of one stage, counted on from its last checkpoint before."""
    settings = read_run([str(run / "run.yaml")])
    place = place_of_child(settings, checkpoint_of_parent(settings).state) if settings.parent else Place()
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if int(folder.name.removeprefix("step-")) <= first_step:
            place = Place.from_json(Checkpoint(folder).state)
    order = order_of(settings, place)
    first_slot = place.progress.stage_tokens // runs.LENGTH + (first_step - place.progress.step) * runs.WINDOWS
    return order.identities(order.windows(first_slot, num_steps * runs.WINDOWS))


@pytest.fixture(scope="module")
def branch(path, tmp_path_factory) -> Path:
    """A finished branch that left the path at step 10 and goes down as the path goes to its end."""
    output = tmp_path_factory.mktemp("branches") / "branch"
    branched(path, 10, 10, output, "--same-windows", "--floor", "1e-4", "--shape", "linear", "--train")
    return output


def test_with_same_windows_it_sees_what_the_path_sees_from_there_on(path, branch):
    expected = chain.lengthen(chain.START, identities(path, 10, 10))
    assert runs.lines(branch / "order.jsonl")[-1]["chain"] == expected


def test_its_first_step_is_the_paths_next_one_to_the_bit(path, branch):
    """Same weights, moments, windows and rate: nothing was lost on the way. The second loss shows the first update."""
    here, there = runs.lines(branch / "metrics.jsonl"), runs.lines(path / "metrics.jsonl")[10:]
    for key in ("loss", "grad_norm", "learning_rate", "loss_by_source"):
        assert here[0][key] == there[0][key]
    assert here[1]["loss"] == there[1]["loss"]
    assert here[2]["loss"] != there[2]["loss"]


def test_it_goes_down_to_its_floor(branch):
    rates = [line["learning_rate"] for line in runs.lines(branch / "metrics.jsonl")]
    assert rates == pytest.approx([5e-3 - (5e-3 - 1e-4) * step / 10 for step in range(10)], abs=1e-15)


def test_its_ledger_is_the_paths_where_it_has_seen_the_same(path, branch):
    ended, there = (RunFolder(run).latest().state["ledger"] for run in (branch, path))
    assert ended == there


def test_without_it_reads_what_nobody_in_the_lineage_has_read(path, tmp_path):
    branched(path, 10, 4, tmp_path / "branch", "stages.0.replay={share: 0}", "--train")
    seen = set(identities(path, 0, 8)) | set(identities(path, 8, 2))
    assert not seen & set(identities(tmp_path / "branch", 0, 4))


def test_what_is_read_is_the_windows_that_the_path_trained_on(path):
    """What the tests here hold branches against: the path's own chain, from its stages' orders."""
    of_stages = identities(path, 0, 8) + identities(path, 8, 12)
    assert runs.lines(path / "order.jsonl")[-1]["chain"] == chain.lengthen(chain.START, of_stages)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_path_goes_on_as_if_nothing_had_been(data, path, tmp_path, ranks):
    """Left and branched off at step 6, within its first stage; equal to the bit to the path that was never left."""
    output = tmp_path / "path"
    config = path_settings(data, output)
    runs.cpt("train", config, before=runs.ask_to_stop_at(5), ranks=ranks)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    branched(output, "latest", 2, tmp_path / "branch", "--same-windows")
    runs.trained(tmp_path / "branch" / "run.yaml", ranks=ranks)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    runs.trained(config, ranks=ranks)
    unbroken = path
    if ranks > 1:
        unbroken = tmp_path / "unbroken"
        runs.trained(path_settings(data, unbroken), ranks=ranks)
    found, expected = runs.story(output), runs.story(unbroken)
    assert set(found["checkpoints"]) - set(expected["checkpoints"]) == {"step-00000006"}  # where it was stopped
    runs.assert_same_story({**found, "checkpoints": expected["checkpoints"]}, expected)
    expected = chain.lengthen(chain.START, identities(path, 6, 2))
    assert runs.lines(tmp_path / "branch" / "order.jsonl")[-1]["chain"] == expected


def test_at_the_end_of_the_path_it_goes_on_with_its_last_stage(data, path, tmp_path):
    """As the same path would have, had its last stage been longer."""
    branched(path, "latest", 4, tmp_path / "branch", "--same-windows", "--train")
    longer = yaml.safe_load(path_settings(data, tmp_path / "longer").read_text())
    longer["stages"][1]["tokens"] = 15 * STEP
    runs.trained(runs.write_settings(tmp_path / "longer.yaml", longer))
    expected = chain.lengthen(chain.START, identities(tmp_path / "longer", 20, 4))
    assert runs.lines(tmp_path / "branch" / "order.jsonl")[-1]["chain"] == expected


def test_a_branch_of_a_branch_goes_on_with_the_same_stage(path, tmp_path):
    branched(path, 10, 6, tmp_path / "one", "--same-windows", "checkpoint.every_tokens=96", "--train")
    branched(tmp_path / "one", 5, 3, tmp_path / "two", "--same-windows", "--train")
    expected = chain.lengthen(chain.START, identities(path, 15, 3))
    assert runs.lines(tmp_path / "two" / "order.jsonl")[-1]["chain"] == expected


def test_a_branch_that_was_stopped_needs_its_path_no_more(path, tmp_path):
    here = runs.copy(path, tmp_path / "path")
    branched(here, 10, 8, tmp_path / "whole", "--same-windows", "--train")
    branched(here, 10, 8, tmp_path / "branch", "--same-windows")
    runs.cpt("train", tmp_path / "branch" / "run.yaml", before=runs.ask_to_stop_at(3))
    for folder in (here / "checkpoints").glob("step-*"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    runs.trained(tmp_path / "branch" / "run.yaml")
    found, expected = runs.story(tmp_path / "branch"), runs.story(tmp_path / "whole")
    runs.assert_same_story({**found, "checkpoints": expected["checkpoints"]}, expected)


# ---- what cannot work


def words(tmp_path: Path, *more: object, at: object = 10, steps: int = 3) -> list[object]:
    return ["--at", at, "--tokens", steps * STEP, "--output", tmp_path / "branch", *more]


def told_once(told: str) -> str:
    """The one line that was told."""
    (line,) = told.splitlines()
    return line


def test_a_checkpoint_that_is_gone_is_told_with_those_that_are_there_and_what_keeps_them(path, tmp_path):
    line = told_once(refused(path, *words(tmp_path, at=7)))
    assert "there is no checkpoint at step 7; there are: 5, 8, 10, 15, 20; a run keeps its last few" in line
    assert "(checkpoint.keep_last), for ever those of keep_every_tokens and keep_at_tokens" in line
    assert not (tmp_path / "branch").exists()


def test_a_place_that_is_no_step_is_refused(path, tmp_path):
    assert "--at soon: a step, or latest" in told_once(refused(path, *words(tmp_path, at="soon")))


def test_a_run_that_has_saved_nothing_cannot_be_left(path, tmp_path):
    here = runs.copy(path, tmp_path / "path")
    (here / "checkpoints").rename(here / "elsewhere")
    assert f"{here} has saved no checkpoint yet" in told_once(refused(here, *words(tmp_path)))


def test_a_path_whose_rate_is_0_cannot_be_left(path, tmp_path):
    branched(path, 10, 2, tmp_path / "down", "--train", "stages.0.schedule.shape=linear")
    again = tmp_path / "again"
    branched(tmp_path / "down", 2, 2, again, "--floor", "1e-9", "--train")
    line = told_once(refused(again, *words(tmp_path, "--floor", "1", at=2)))
    assert "stages.0.schedule.floor = 1: the branch begins at" in line
    assert "leave a path that is higher" in line


def test_an_output_that_is_used_is_refused(path, base, tmp_path):
    line = told_once(refused(path, "--at", 10, "--tokens", 99, "--output", base))
    assert f"--output {base}: there is a run already; name another folder" in line
    (tmp_path / "branch").mkdir()
    (tmp_path / "branch" / "file").touch()
    assert "the folder is used, but not by a run" in told_once(refused(path, *words(tmp_path)))


def test_a_branch_of_no_tokens_is_refused(path, tmp_path):
    assert "stages.0.tokens = 0: at least 1" in told_once(refused(path, *words(tmp_path, steps=0)))


def test_a_folder_that_is_no_run_cannot_be_left(tmp_path):
    assert f"{tmp_path} is no run folder" in told_once(refused(tmp_path, *words(tmp_path)))


def test_the_same_windows_are_those_of_one_stage(path, tmp_path):
    line = told_once(refused(path, *words(tmp_path, "--same-windows", at=5, steps=4)))
    assert "--tokens: the branch takes 384 and stage old of" in line
    assert "has 288 left from there; branch later or for less, or leave --same-windows out" in line


def test_a_stage_cannot_go_on_with_one_of_other_settings(path, tmp_path):
    line = told_once(refused(path, *words(tmp_path, "--same-windows", "seed=7", "stages.0.replay.share=0.5")))
    assert "stages.0.continues: the windows of stage new of" in line
    assert "here seed and stages.0.replay are others; set them back, or leave continues out" in line


def test_only_a_childs_first_stage_can_go_on_with_another(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 4, continues=True)])
    ((status, told),) = runs.cpt("train", runs.write_settings(tmp_path / "run.yaml", plain))
    assert status == 2
    assert "stages.0.continues: only the first stage of a run with a parent can go on with the parent's" in told


def test_a_path_of_an_earlier_version_cannot_be_gone_on_with_from_its_end():
    with pytest.raises(Fault, match="is of a version that did not keep how its last stage began"):
        Place().going_on_with_stage_of(Place(Progress(9, 900, 2)), num_stages_above=2)


def test_who_is_left_is_told_with_how_to_start(path, tmp_path, capfd):
    from cpt.cli import main

    output = tmp_path / "branch"
    assert main(["branch", str(path), "--at", "10", "--tokens", str(3 * STEP), "--output", str(output)]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{output}: leaves {path} at step 10 after 960 tokens",
        "3 steps, 288 tokens, learning rate 5.00e-03 down to 1.25e-03",
        f"cpt train {output}/run.yaml",
    ]
