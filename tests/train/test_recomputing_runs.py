"""`cpt train` with blocks that are computed again and compiled: the same run; what cannot be is refused at once."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import runs


def test_a_run_that_computes_again_is_the_same_run_to_the_bit(base, tmp_path):
    told = runs.trained(base.parent / "base.yaml", f"output={tmp_path / 'run'}", "recompute.mode=full")
    assert "computed again in the backward pass: full in all blocks; compiled: not compiled" in told
    runs.assert_same_story(runs.story(tmp_path / "run"), runs.story(base))


def test_a_compiled_run_is_near_and_may_be_taken_up_without(base, tmp_path):
    words = [base.parent / "base.yaml", f"output={tmp_path / 'run'}"]
    more = ["recompute={mode: selective, blocks: 1}", "compile={blocks: true, backend: aot_eager}"]
    ((status, told),) = runs.cpt("train", *words, *more, before=runs.ask_to_stop_at(9))
    assert status == 143
    assert "selective in the first 1 block(s); compiled: each operation of a block" in told
    runs.trained(*words)
    found, expected = runs.story(tmp_path / "run"), runs.story(base)
    assert found["order"] == expected["order"]
    for part in ("metrics", "scores"):
        losses = [[record["loss"] for record in story[part]] for story in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # measured 1e-6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["recompute={mode: full, blocks: 9}"],
            "recompute.blocks = 9: the model has 2; lower it, or leave it out for all",
        ),
        (["recompute.blocks=1"], "recompute.blocks = 1: mode is none, so nothing is computed again; set mode"),
        (["recompute.mode=fulll"], "recompute.mode = 'fulll' is not known; did you mean full?"),
        (["compile.backend=inductr"], "compile.backend = 'inductr' is not known; did you mean inductor?"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(base, tmp_path, words, line):
    ((status, told),) = runs.cpt("train", base.parent / "base.yaml", f"output={tmp_path / 'run'}", *words)
    assert status == 2 and line in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_backend_that_does_not_work_is_refused_before_anything_is_written(base, tmp_path):
    def break_the_compiler() -> None:
        def broken(function, backend):
            raise RuntimeError("No working C++ compiler found")

        torch.compile = broken

    words = [base.parent / "base.yaml", f"output={tmp_path / 'run'}", "compile.blocks=true"]
    ((status, told),) = runs.cpt("train", *words, before=break_the_compiler)
    assert status == 2 and "does not work on this machine (No working C++ compiler found)" in told
    assert not (tmp_path / "run").exists()
