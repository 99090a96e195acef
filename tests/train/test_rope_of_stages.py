"""Rotary positions that change where a stage begins: trained with, exported, inherited, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cpt_harness import runs

FIRST, SECOND = 4, 6


@pytest.fixture(scope="module")
def changed(data, tmp_path_factory) -> Path:
    """A run whose second stage turns more slowly and reaches further; both ends of stages are kept."""
    folder = tmp_path_factory.mktemp("rope")
    stages = [
        runs.stage(data, "prose", FIRST),
        runs.stage(data, "code", SECOND, rope={"base": 50, "longest_sequence": 64}),
    ]
    plain = runs.settings(
        data, folder / "run", stages, checkpoint={"keep_last": 9, "every_tokens": 3 * runs.TOKENS_A_STEP}
    )
    runs.trained(runs.write_settings(folder / "run.yaml", plain))
    return folder / "run"


def export(model: Path, out: Path) -> dict:
    ((status, told),) = runs.cpt("convert", "to-hf", model, out)
    assert status == 0, told
    return json.loads((out / "config.json").read_text())


def test_only_the_stage_that_changes_it_and_those_after_compute_with_it(changed, data, tmp_path):
    plain = runs.settings(
        data, tmp_path / "plain", [runs.stage(data, "prose", FIRST), runs.stage(data, "code", SECOND)]
    )
    runs.trained(runs.write_settings(tmp_path / "plain.yaml", plain))
    found, expected = ([r["loss"] for r in runs.lines(run / "metrics.jsonl")] for run in (changed, tmp_path / "plain"))
    assert found[:FIRST] == expected[:FIRST]
    assert all(abs(a - b) > 1e-7 for a, b in zip(found[FIRST:], expected[FIRST:], strict=True))


def test_what_is_exported_says_what_the_weights_were_trained_with(changed, tmp_path):
    checkpoints = changed / "checkpoints"
    config = export(changed, tmp_path / "last")
    assert (config["rope_theta"], config["max_position_embeddings"]) == (50.0, 64)
    config = export(checkpoints / f"step-{FIRST:08d}", tmp_path / "of the first stage")
    assert (config["rope_theta"], config["max_position_embeddings"]) == (10000.0, 32)
    assert export(checkpoints / f"step-{FIRST + 2:08d}", tmp_path / "in the second")["rope_theta"] == 50.0


@pytest.mark.parametrize(("at", "base"), [("latest", 50.0), (FIRST, 10000.0), (FIRST + 2, 50.0)])
def test_a_child_goes_on_with_what_its_parent_had_there(changed, data, tmp_path, at, base):
    stages = [runs.stage(data, "prose", 2)]
    plain = runs.settings(data, tmp_path / "child", stages, parent={"run": str(changed), "at": at})
    del plain["model"], plain["sequence_length"]
    runs.trained(runs.write_settings(tmp_path / "child.yaml", plain))
    assert f"rope_base: {base}" in (tmp_path / "child" / "run.yaml").read_text()
    last = [score for score in runs.lines(changed / "scores.jsonl") if at == "latest" or score["step"] == at][-2:]
    first = runs.lines(tmp_path / "child" / "scores.jsonl")[:2]
    for above, below in zip(last, first, strict=bool(last)):
        assert below["loss"] == pytest.approx(above["loss"], abs=1e-6)


def test_stopped_in_that_stage_it_goes_on_bit_for_bit(changed, tmp_path):
    other = tmp_path / "other"
    words = (changed / "run.yaml", f"output={other}")
    runs.cpt("train", *words, before=runs.ask_to_stop_at(FIRST + 2))
    runs.trained(*words)
    found, expected = runs.story(other), runs.story(changed)
    assert found["metrics"] == expected["metrics"]
    for name, values in expected["tensors"]["master"].items():
        assert torch.equal(found["tensors"]["master"][name], values)


def test_windows_longer_than_the_model_knew_are_trained_on_where_the_first_stage_reaches_so_far(data, tmp_path):
    stage = runs.stage(data, "prose", 2, rope={"scaling": {"name": "linear", "factor": 2}, "longest_sequence": 48})
    plain = runs.settings(data, tmp_path / "run", [stage], sequence_length=48)
    runs.trained(runs.write_settings(tmp_path / "run.yaml", plain))
    config = export(tmp_path / "run", tmp_path / "out")
    assert config["rope_scaling" if "rope_scaling" in config else "rope_parameters"]["factor"] == 2
    del stage["rope"]
    ((status, told),) = runs.cpt(
        "train", runs.write_settings(tmp_path / "run.yaml", plain), f"output={tmp_path / 'no'}"
    )
    assert status == 2 and "sequence_length = 48: the model takes up to 32" in told
