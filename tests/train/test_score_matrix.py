"""Scores of whole runs: what a child inherits, what stages say in the log and in the report, and what scoring costs."""

from __future__ import annotations

import json

import pytest
from cpt_harness import runs

from cpt.checkpoint import RunFolder
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


@pytest.mark.parametrize(
    ("held_out", "begins"),
    [
        ([], "this run is scored nowhere: there is no held-out text of prose, code; name it in evaluation.held_out"),
        (["prose"], "what is learned of code is scored nowhere: there is no held-out text of code; name it in"),
        (["prose", "code"], None),
    ],
)
def test_new_sources_without_held_out_text_are_warned_of_once_before_the_first_step(data, tmp_path, held_out, begins):
    stages = [runs.stage(data, name, 1) for name in ("prose", "code", "code")]
    stages[2]["name"] = "code again"
    plain = runs.settings(data, tmp_path / "run", stages)
    plain["evaluation"]["held_out"] = {name: str(data / f"{name}-held-out") for name in held_out}
    told = runs.trained(runs.write_settings(tmp_path / "run.yaml", plain), ranks=2)
    lines = [line for line in told.splitlines() if "scored nowhere" in line]
    assert len(lines) == bool(begins) and all(f" W {begins}" in line for line in lines)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_forgets_too_much_is_saved_and_stopped_says_why_and_goes_on_where_more_is_allowed(
    data, base, tmp_path, ranks
):
    plain = runs.settings(data, tmp_path / "plain", [runs.stage(data, "code", 8)], parent={"run": str(base)})
    plain["evaluation"]["every_tokens"] = 2 * runs.TOKENS_A_STEP
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    runs.trained(config)
    limit = {"source": "prose", "above": 0.02}
    prose = [s["loss"] for s in runs.lines(tmp_path / "plain" / "scores.jsonl") if s["source"] == "prose"]
    at = next(row for row, loss in enumerate(prose) if loss - min(prose[: row + 1]) > limit["above"])
    assert 0 < 2 * at < 8, "it stops in mid-run"

    guarded = tmp_path / "guarded"
    words = [config, f"output={guarded}", f"stop_if.forgetting={json.dumps(limit)}"]
    for _ in range(2):  # the second time nothing is trained on
        ended = runs.cpt("train", *words, ranks=ranks)
        assert [status for status, _ in ended] == [1] * ranks
        assert f"cpt train: stopped after step {2 * at}, which is saved: prose has lost " in ended[0][1]
        assert "Traceback" not in ended[0][1]
        note = json.loads((guarded / "stopped.json").read_text())
        assert note["step"] == 2 * at and note["stop_if"]["source"] == "prose"
        assert note["stop_if"]["forgetting"] == pytest.approx(prose[at] - min(prose[: at + 1]), abs=1e-5)
        assert len(runs.lines(guarded / "metrics.jsonl")) == 2 * at
        assert not (guarded / "finished.json").exists()
    runs.trained(*words[:2], ranks=ranks)
    assert not (guarded / "stopped.json").exists()
    if ranks == 1:
        found, expected = runs.story(guarded), runs.story(tmp_path / "plain")
        assert found.pop("checkpoints") and expected.pop("checkpoints")  # it saved once more, where it stopped
        assert found["metrics"] == expected["metrics"] and found["order"] == expected["order"]
        assert found["scores"] == expected["scores"]


@pytest.fixture(scope="module")
def limited(data, base, tmp_path_factory):
    """Settings of a child of `base` that `stop_if` stops after step 2, the first that is evaluated, and its folder."""
    output = tmp_path_factory.mktemp("limited") / "run"
    plain = runs.settings(data, output, [runs.stage(data, "code", 6)], parent={"run": str(base)})
    plain["evaluation"]["every_tokens"] = 2 * runs.TOKENS_A_STEP
    plain["stop_if"] = {"forgetting": {"source": "prose", "above": 1e-6}}
    config = runs.write_settings(output.parent / "run.yaml", plain)
    for _ in range(2):  # the second time nothing is trained on
        ((status, _),) = runs.cpt("train", config)
        assert status == 1
    return config, output


def stops_of(run):
    """What ledger.json and the newest checkpoint say, which is the same."""
    told = json.loads((run / "ledger.json").read_text())
    state = RunFolder(run).latest().state
    assert state["ledger"] == told
    return told["stops"]


def test_what_stopped_a_run_is_in_its_ledger_once(limited):
    _, output = limited
    lost = json.loads((output / "stopped.json").read_text())["stop_if"]["forgetting"]
    assert stops_of(output) == [
        {"stage": "code", "step": 2, "source": "prose", "forgetting": round(lost, 6), "above": 1e-6}
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_exceeded_in_an_evaluation_that_a_signal_left_to_the_resume_is_in_the_ledger_all_the_same(
    limited, tmp_path, ranks
):
    config, output = limited
    words = ["train", config, f"output={tmp_path / 'run'}"]
    runs.cpt(*words, before=runs.ask_to_stop_at(1))
    assert not [s for s in runs.lines(tmp_path / "run" / "scores.jsonl") if s["step"] == 2], "the signal came first"
    ended = runs.cpt(*words, ranks=ranks)
    assert [status for status, _ in ended] == [1] * ranks
    if ranks == 1:
        runs.assert_same_story(runs.story(tmp_path / "run"), runs.story(output))
    (stop,), (expected,) = stops_of(tmp_path / "run"), stops_of(output)
    assert stop == {**expected, "forgetting": pytest.approx(expected["forgetting"], abs=1e-5)}


def test_so_it_is_where_the_signal_came_in_the_last_step_of_a_stage(data, base, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 2)], parent={"run": str(base)})
    plain["evaluation"]["every_tokens"] = None
    plain["stop_if"] = {"forgetting": {"source": "prose", "above": 1e-6}}
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    ((status, _),) = runs.cpt("train", config, before=runs.ask_to_stop_at(1))
    assert status == 1
    (stop,) = stops_of(tmp_path / "run")
    assert (stop["stage"], stop["step"]) == ("code", 2)
    runs.trained(config, "stop_if.forgetting=[]")
    assert stops_of(tmp_path / "run") == [stop]


def test_a_stop_stays_as_history_when_the_run_goes_on_and_in_its_children(limited, tmp_path):
    config, output = limited
    copied, stops = runs.copy(output, tmp_path / "run"), stops_of(output)
    words = [config, f"output={copied}"]
    runs.cpt("train", *words, "stop_if.forgetting=[]", before=runs.ask_to_stop_at(3))
    assert runs.num_lines(copied / "metrics.jsonl") == 4
    assert stops_of(copied) == stops
    runs.trained(*words, "stop_if.forgetting=[]")
    assert stops_of(copied) == stops
    runs.trained(*words[:1], f"output={tmp_path / 'child'}", f"parent.run={copied}", "stop_if.forgetting=[]")
    assert stops_of(tmp_path / "child") == stops


def test_a_limit_exceeded_by_the_last_evaluation_leaves_a_run_that_is_not_finished(data, base, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 8)], parent={"run": str(base)})
    plain["evaluation"]["every_tokens"] = None
    plain["stop_if"] = {"forgetting": {"source": "prose", "above": 0.0}}
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    ((status, told),) = runs.cpt("train", config)
    assert status == 1 and "stopped after step 8" in told
    assert not (tmp_path / "run" / "finished.json").exists()
    runs.trained(config, "stop_if.forgetting=[]")
    assert (tmp_path / "run" / "finished.json").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_scores_after_every_step_is_to_the_bit_the_one_that_scores_nothing_and_its_cost_is_told(
    data, tmp_path, ranks
):
    replay = {"share": 0.25, "scope": "all_seen"}
    stages = [runs.stage(data, "prose", 3), runs.stage(data, "code", 4, replay=replay)]
    plain = runs.settings(data, tmp_path / "scored", stages, methods=[{"name": "reptile", "every": 2}])
    plain["evaluation"] = {**plain["evaluation"], "every_tokens": runs.TOKENS_A_STEP, "windows": 5}
    told = runs.trained(runs.write_settings(tmp_path / "scored.yaml", plain), ranks=ranks)
    plain = {**plain, "output": str(tmp_path / "unscored"), "evaluation": {}}
    runs.trained(runs.write_settings(tmp_path / "unscored.yaml", plain), ranks=ranks)

    scores = runs.lines(tmp_path / "scored" / "scores.jsonl")
    assert len(scores) == 2 * 8 and all(score["evaluation_seconds"] > 0 for score in scores)
    assert told.count(" s)") >= 8 and "held out at step 7: prose " in told
    assert not (tmp_path / "unscored" / "scores.jsonl").read_text()
    (tmp_path / "unscored" / "scores.jsonl").write_text((tmp_path / "scored" / "scores.jsonl").read_text())
    runs.assert_same_story(runs.story(tmp_path / "scored"), runs.story(tmp_path / "unscored"))
