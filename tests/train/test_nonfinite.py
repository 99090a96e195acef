"""Nothing goes wrong in silence: not numbers that are not finite, not a full disk, not a damaged checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.checkpoint import RunFolder
from cpt.engine import Engine
from cpt.methods import reptile

LAYOUTS = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16") if zero or precision == "fp32"]


@pytest.fixture
def config(data, tmp_path) -> Path:
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 9)], methods=["reptile"])
    return runs.write_settings(tmp_path / "run.yaml", plain)


def change_step(number: int, before=None, after=lambda result: result):
    """What changes the engine's step after `number` steps: `before(engine)`, then `after(result)`."""

    def patch() -> None:
        step = Engine.step

        def changed(engine, tokens, sources, num_sources, rate, progress, *rest):
            is_it = progress.step == number
            if is_it and before:
                before(engine)
            result = step(engine, tokens, sources, num_sources, rate, progress, *rest)
            return after(result) if is_it else result

        Engine.step = changed

    return patch


def spoil_a_master(engine: Engine) -> None:
    if engine._mesh.rank == engine._mesh.size - 1:
        engine.masters.pieces[-1].values[0] = float("nan")  # of the head, which every position meets
    engine.masters.refresh()


def poison_gradients() -> None:
    reptile.Method.after_forward = lambda method, forward: (
        forward.losses.mean() * float("nan") if forward.progress.step == 6 else None
    )


def assert_ended_loudly(ended: list[tuple[int, str]], run: Path, *told: str) -> None:
    assert [status for status, _ in ended] == [1] * len(ended), ended
    last_line = ended[0][1].splitlines()[-1]
    assert last_line.startswith("cpt train: step 7: loss ") and "not finite" in last_line, ended[0][1]
    for part in told:
        assert part in last_line
    assert "Traceback" not in ended[0][1] and all("step 7" not in other for _, other in ended[1:])
    found = json.loads((run / "autopsy" / "step-00000007.json").read_text())
    assert found["step"] == 7 and found["policy"] == "stop" and len(found["windows"]) == runs.WINDOWS
    assert all(window["source"] == "prose" and window["first_token"] >= 0 for window in found["windows"])
    assert [record["step"] for record in runs.lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert RunFolder(run).latest().state["progress"]["step"] == 5
    assert not (run / "finished.json").exists()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_weight_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint_whole(config, tmp_path, layout):
    words = [config, f"zero={layout[0]}", f"precision={layout[1]}"]
    ended = runs.cpt("train", *words, ranks=2, before=change_step(6, spoil_a_master))
    assert_ended_loudly(ended, tmp_path / "run", "loss nan")


def test_gradients_that_are_not_finite_end_the_run_though_the_loss_is(config, tmp_path):
    ended = runs.cpt("train", config, ranks=2, before=poison_gradients)
    assert_ended_loudly(ended, tmp_path / "run", "loss 3.", "the update was left out")


def test_a_norm_that_is_not_finite_ends_the_run_though_the_update_was_made(config, tmp_path):
    spoiled = change_step(6, after=lambda result: dataclasses.replace(result, grad_norm=float("inf")))
    ended = runs.cpt("train", config, before=spoiled)
    assert_ended_loudly(ended, tmp_path / "run", "gradient norm inf", "the update was made")


def test_the_same_command_goes_on_from_the_last_checkpoint_afterwards(config, tmp_path):
    runs.cpt("train", config, before=change_step(6, spoil_a_master))
    assert "going on from" in runs.trained(config)
    assert [record["step"] for record in runs.lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["state.json", "index.json", "pieces-00000.safetensors", "checksums.json"])
def test_a_damaged_newest_checkpoint_is_told_and_the_run_ends_the_same_from_the_one_before(base, tmp_path, name, harm):
    run = runs.copy(base, tmp_path / "run")
    (run / "finished.json").unlink()
    harm(run / "checkpoints" / "step-00000020" / name)
    told = runs.trained(run / "run.yaml", f"output={run}")
    assert f"step-00000020/{name}" in told and f"going on from {run}/checkpoints/step-00000015" in told
    runs.assert_same_story(runs.story(run), runs.story(base))


def test_if_every_checkpoint_is_damaged_nothing_is_begun_anew(base, tmp_path):
    run = runs.copy(base, tmp_path / "run")
    (run / "finished.json").unlink()
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "index.json").unlink()
    ((status, told),) = runs.cpt("train", run / "run.yaml", f"output={run}")
    assert status == 2 and "no checkpoint is whole" in told and "step-00000015/index.json is missing" in told
    assert len(runs.lines(run / "metrics.jsonl")) == 20
