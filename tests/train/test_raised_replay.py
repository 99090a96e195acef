"""Replay's share follows what is forgotten: recorded in the ledger, and the same order after any stop, on any ranks."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.checkpoint import Checkpoint, Place
from cpt.run import read_run
from cpt.run.beginning import place_of_child
from cpt.run.stages import order_of

STEP = runs.TOKENS_A_STEP
NUM_STEPS = 24


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory) -> Path:
    """Prose for 12 steps: enough to be forgotten."""
    output = tmp_path_factory.mktemp("raising") / "parent"
    plain = runs.settings(data, output, [runs.stage(data, "prose", 12)])
    runs.trained(runs.write_settings(output.parent / "parent.yaml", plain))
    return output


def child_settings(data: Path, parent: Path, output: Path, **more) -> Path:
    """Code with a tenth of replay, evaluated every 4 steps and saved every 5; a nat too much is half of the share."""
    stage = runs.stage(data, "code", NUM_STEPS, replay={"share": "10%", "scope": "all_seen"})
    guard = {"forgetting": {"source": "prose", "above": 0.02}, "gain": 0.5, "at_most": "60%"}
    plain = runs.settings(data, output, [stage], parent={"run": str(parent)}, raise_replay=guard, **more)
    plain["evaluation"]["every_tokens"] = 4 * STEP
    plain["checkpoint"]["keep_last"] = 9
    return runs.write_settings(output.parent / f"{output.name}.yaml", plain)


@pytest.fixture(scope="module")
def raised(data, parent, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("raised") / "raised"
    runs.trained(child_settings(data, parent, output))
    return output


def changes_of(run: Path) -> list[dict]:
    return json.loads((run / "ledger.json").read_text())["share_changes"]


def test_the_ledger_says_what_the_share_became_when_and_why(raised):
    changes, share = changes_of(raised), Fraction(1, 10)
    scores = [line for line in runs.lines(raised / "scores.jsonl") if line["source"] == "prose"]
    losses = [line["loss"] for line in scores]
    expected = []
    for number in range(1, len(losses) - 1):  # not before the first step, nor at the stage's end
        lost = losses[number] - min(losses[: number + 1])
        asked = Fraction(round((float(share) + 0.5 * (lost - 0.02)) * 1000), 1000)
        now = min(Fraction(6, 10), max(Fraction(1, 10), asked))
        if now != share:
            expected.append((scores[number]["step"] * runs.WINDOWS, str(now), round(lost, 6)))
        share = now
    assert [(one["window"], one["share"], one["forgetting"]) for one in changes] == expected
    assert len(changes) >= 2 and {(one["stage"], one["source"]) for one in changes} == {("code", "prose")}


def test_as_much_is_replayed_as_the_ledger_says(raised):
    settings, changes = read_run([str(raised / "run.yaml")]), changes_of(raised)
    newest = sorted((raised / "checkpoints").glob("step-*"))[-2]
    place = Place.from_json(Checkpoint(newest).state)
    order = order_of(settings, place)
    bounds = [0, *(one["window"] for one in changes), NUM_STEPS * runs.WINDOWS]
    shares = [Fraction(1, 10), *(Fraction(one["share"]) for one in changes)]
    for first, last, share in zip(bounds, bounds[1:], shares, strict=False):
        replayed = order.mixture.counts(last)[-1] - order.mixture.counts(first)[-1]
        assert abs(replayed - share * (last - first)) < 1
    assert order.mixture.counts(bounds[-1])[-1] > 1.5 * bounds[-1] / 10


def test_without_the_guard_the_order_is_the_same_up_to_the_first_change(data, parent, raised, tmp_path):
    runs.trained(child_settings(data, parent, tmp_path / "plain"), "raise_replay.forgetting=[]")
    first = changes_of(raised)[0]["window"] // runs.WINDOWS
    here, there = (runs.lines(run / "order.jsonl") for run in (raised, tmp_path / "plain"))
    assert here[:first] == there[:first] and here[first] != there[first]


@pytest.mark.parametrize("stopped_at", [3, 4, 8, 10])
def test_stopped_anywhere_it_goes_on_to_the_bit(data, parent, raised, tmp_path, stopped_at):
    """Before an evaluation, in the step that is evaluated, and between."""
    config = child_settings(data, parent, tmp_path / "run")
    runs.cpt("train", config, before=runs.ask_to_stop_at(stopped_at - 1))
    assert runs.num_lines(tmp_path / "run" / "metrics.jsonl") == stopped_at
    runs.trained(config)
    found, expected = runs.story(tmp_path / "run"), runs.story(raised)
    runs.assert_same_story({**found, "checkpoints": []}, {**expected, "checkpoints": []})


def test_on_two_ranks_in_between_the_order_is_proved_the_same(data, parent, raised, tmp_path):
    config = child_settings(data, parent, tmp_path / "run")
    runs.cpt("train", config, before=runs.ask_to_stop_at(5))
    runs.cpt("train", config, before=runs.ask_to_stop_at(13), ranks=2)
    runs.trained(config)
    ((status, _),) = runs.cpt("verify-order", tmp_path / "run", raised)
    assert status == 0
    assert [(one["window"], one["share"]) for one in changes_of(tmp_path / "run")] == [
        (one["window"], one["share"]) for one in changes_of(raised)
    ]


def test_a_branch_on_the_same_windows_begins_with_the_share_as_it_was(data, parent, raised, tmp_path):
    state = Checkpoint(sorted((raised / "checkpoints").glob("step-*"))[-2]).state
    at = state["progress"]["step"]
    words = ["branch", raised, "--at", at, "--tokens", 2 * STEP, "--output", tmp_path / "branch", "--same-windows"]
    ((status, told),) = runs.cpt(*words)
    assert status == 0, told
    branch = read_run([str(tmp_path / "branch" / "run.yaml")])
    place = place_of_child(branch, state)
    assert place.share_changes == Place.from_json(state).share_changes != ()
    there = order_of(read_run([str(raised / "run.yaml")]), Place.from_json(state))
    here = order_of(branch, place)
    first = Place.from_json(state).progress.stage_tokens // runs.LENGTH
    assert here.identities(here.windows(0, 16)) == there.identities(there.windows(first, 16))


def test_a_grandchild_is_told_of_the_changes_and_begins_with_its_own_share(data, raised, tmp_path):
    plain = runs.settings(data, tmp_path / "next", [runs.stage(data, "prose", 2)], parent={"run": str(raised)})
    runs.trained(runs.write_settings(tmp_path / "next.yaml", plain))
    assert changes_of(tmp_path / "next") == changes_of(raised)
