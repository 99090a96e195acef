"""Scores of whole runs: what a child inherits, what stages say in the log and in the report, and what scoring costs."""

from __future__ import annotations

import json

import pytest
from cpt_harness import runs

from cpt.cli import main
from cpt.evaluation.history import read_history
from cpt.evaluation.measures import measures


def test_a_child_that_names_no_held_out_text_scores_its_parents_before_step_1_on_the_way_and_at_every_stage_end(
    data, base, tmp_path, capsys
):
    stages = [runs.stage(data, "code", 3), runs.stage(data, "again", 2, "code")]
    plain = runs.settings(data, tmp_path / "child", stages, parent={"run": str(base)})
    plain["evaluation"] = {"windows": 0, "every_tokens": 2 * runs.TOKENS_A_STEP}
    told = runs.trained(runs.write_settings(tmp_path / "child.yaml", plain))
    scores = runs.lines(tmp_path / "child" / "scores.jsonl")
    assert [(s["step"], s["stage"], s["stage_end"], s["source"]) for s in scores] == [
        (step, stage, is_end, source)
        for step, stage, is_end in ((0, "start", False), (2, "code", False), (3, "code", True), (4, "again", False),
                                    (5, "again", True))
        for source in ("prose", "code")
    ]  # fmt: skip
    # Row 0 is the parent's last row.
    last = {s["source"]: s["loss"] for s in runs.lines(base / "scores.jsonl")[-2:]}
    assert {s["source"]: s["loss"] for s in scores[:2]} == pytest.approx(last, rel=1e-12)
    history = read_history(tmp_path / "child")
    assert [(stage.run, stage.name, stage.sources) for stage in history.stages] == [
        ("base", "prose", ("prose",)), ("child", "code", ("code",)), ("child", "again", ("code",)),
    ]  # fmt: skip
    found = measures(history)
    assert f"after stage again: learned {found.learned:.4f}, retained {found.retained:.4f}, forgetting" in told
    prose = scores[-2]["loss"]
    assert found.backward_transfer == pytest.approx(
        (last["prose"] - prose + scores[5]["loss"] - scores[-1]["loss"]) / 2
    )
    assert "after stage code: prose " in told and "after stage code: code" not in told
    assert main(["report", str(tmp_path / "child"), "--json"]) == 0
    (reported,) = json.loads(capsys.readouterr().out)["runs"]
    assert reported["measures"] == vars(found)
    assert reported["scores"][0]["scores"]["prose"]["interval"] == scores[0]["interval"]
