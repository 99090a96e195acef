"""A run that begins from a Hugging Face folder or a parent begins as that model, or is stopped with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cpt_harness import runs
from safetensors.torch import load_file, save_file

from cpt.checkpoint import RunFolder
from cpt.huggingface import probe
from cpt.lineage.tree import Parent, read_lineage
from cpt.run import read_run
from cpt.run.beginning import scores_of_parent


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory) -> Path:
    """The run `base` as a Hugging Face folder, fp32."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert runs.cpt("convert", "to-hf", base, folder, "--dtype", "fp32")[0][0] == 0
    return folder


def config_from(folder: Path, data: Path, tmp_path: Path, steps: int = 2, **more) -> Path:
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", steps)])
    plain["model"] = {"from": str(folder), **more.pop("model", {})}
    return runs.write_settings(tmp_path / "run.yaml", {**plain, **more})


def first_scores(run: Path) -> dict[str, float]:
    return {score["source"]: score["loss"] for score in runs.lines(run / "scores.jsonl") if score["step"] == 0}


def last_scores(run: Path) -> dict[str, float]:
    return {score["source"]: score["loss"] for score in runs.lines(run / "scores.jsonl")}


def stopped(*words: object, **named) -> str:
    ended = runs.cpt("train", *words, **named)
    assert {status for status, _ in ended} == {1}, ended
    return ended[0][1]


@pytest.mark.parametrize(("ranks", "words"), [(1, []), (2, ["zero=3"]), (2, ["zero=2", "precision=bf16"])], ids=str)
def test_it_begins_at_the_loss_of_the_exported_run_on_any_mesh(base, exported, data, tmp_path, ranks, words):
    told = runs.trained(config_from(exported, data, tmp_path), *words, ranks=ranks)
    tolerance = 0.02 if "precision=bf16" in words else 1e-5
    assert first_scores(tmp_path / "run") == pytest.approx(last_scores(base), abs=tolerance)
    assert f"in {exported} under transformers" in told


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_a_probe_that_the_ranks_cannot_share_is_cut_down(even, data, tmp_path, axis, monkeypatch):
    """As that of a large model is, to a length that has nothing to do with the run's."""
    monkeypatch.setattr(probe, "IN_LAYERS_FROM_PARAMETERS", 1)
    monkeypatch.setattr(probe, "_TOKENS_IN_LAYERS", 9)
    told = runs.trained(config_from(even, data, tmp_path), f"mesh.{axis}=2", ranks=2)
    assert f"in {even} under transformers" in told


def test_its_folder_says_the_model_in_full_and_holds_the_tokenizer_alone(exported, data, tmp_path):
    config = config_from(exported, data, tmp_path, evaluation={"windows": 2})
    runs.trained(config)
    plain = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert plain["model"] == {**plain["model"], **runs.MODEL}
    assert plain["weights"] == str(exported)
    assert read_lineage(tmp_path / "run").weights == str(exported)
    assert sorted(p.name for p in (tmp_path / "run" / "tokenizer").iterdir()) == [
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "is finished; nothing to do" in runs.trained(config)


def test_stopped_and_begun_again_it_does_not_begin_from_the_folder_again(exported, data, tmp_path):
    config = config_from(exported, data, tmp_path, steps=6)
    runs.trained(config)
    copied = Path(shutil.copytree(exported, tmp_path / "copied"))
    words = (config, f"model.from={copied}", f"output={tmp_path / 'other'}")
    runs.cpt("train", *words, before=runs.ask_to_stop_at(3))
    (copied / "model.safetensors").unlink()
    runs.trained(*words)
    assert runs.lines(tmp_path / "other" / "order.jsonl") == runs.lines(tmp_path / "run" / "order.jsonl")
    found, expected = (runs.story(tmp_path / name)["tensors"]["master"] for name in ("other", "run"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_setting_than_the_weights_were_trained_with_is_stopped_before_step_1(exported, data, tmp_path):
    told = stopped(config_from(exported, data, tmp_path, model={"norm_epsilon": 10.0}))
    assert "before step 1 the loss on" in told and "this run does not compute with the model that it was given" in told
    assert not (tmp_path / "run" / "checkpoints").exists()
    runs.trained(config_from(exported, data, tmp_path, model={"norm_epsilon": 10.0}), "gate.windows=0")


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_destroy_the_model_are_stopped_after_the_first(exported, data, tmp_path, ranks):
    told = stopped(config_from(exported, data, tmp_path), "stages.0.schedule.peak=20", ranks=ranks)
    assert "after step 1 the loss on the probe text is" in told and "Take a lower peak or a longer warm-up" in told
    assert len(runs.lines(tmp_path / "run" / "metrics.jsonl")) == 1
    runs.trained(
        config_from(exported, data, tmp_path), "stages.0.schedule.peak=20", "gate.largest_jump=1e9", ranks=ranks
    )


def test_a_jump_by_the_tenth_step_is_stopped_too(exported, data, tmp_path):
    config = config_from(exported, data, tmp_path, steps=20)
    told = stopped(config, f"stages.0.schedule={{peak: 20, warmup: {15 * runs.TOKENS_A_STEP}}}")
    assert "after step 10 the loss on the probe text is" in told


def test_a_child_that_does_not_begin_at_its_parents_scores_is_stopped(base, data, tmp_path):
    parent = runs.copy(base, tmp_path / "parent")
    config = runs.write_settings(
        tmp_path / "child.yaml",
        runs.settings(data, tmp_path / "child", [runs.stage(data, "code", 2)], parent={"run": str(parent)}),
    )
    runs.trained(config, f"output={tmp_path / 'as it is'}")
    records = runs.lines(parent / "scores.jsonl")
    records[-1]["loss"] += 0.5
    (parent / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = stopped(config)
    assert f"before step 1 the loss on {records[-1]['source']} is" in told
    assert f"at the end of {parent} it is {records[-1]['loss']:.4f}" in told


def test_other_text_under_the_same_name_is_not_held_against_the_parents(base, data, tmp_path):
    plain = runs.settings(data, tmp_path / "child", [runs.stage(data, "code", 2)], parent={"run": str(base)})
    config = runs.write_settings(tmp_path / "child.yaml", plain)
    above = Parent(base, 20, 20 * runs.TOKENS_A_STEP, 0.0)
    assert set(scores_of_parent(read_run([str(config)]), above)) == {"prose", "code"}
    other = f"evaluation.held_out.prose={data / 'code-held-out'}"
    assert set(scores_of_parent(read_run([str(config), other]), above)) == {"code"}
    assert scores_of_parent(read_run([str(config), "attention=across_documents"]), above) == {}


def test_warm_fills_the_moments_and_leaves_weights_order_and_methods_alone(exported, data, tmp_path):
    reptile = [{"name": "reptile", "every": 2, "step_size": 0.5}]
    config = config_from(exported, data, tmp_path, steps=4, methods=reptile)
    runs.trained(config)
    runs.trained(config, "optimizer_state=warm(3)", f"output={tmp_path / 'warm'}")
    cold, warm = (runs.story(tmp_path / name) for name in ("run", "warm"))
    assert warm["order"] == cold["order"] and warm["ledger"] == cold["ledger"]
    assert warm["metrics"][0]["loss"] == cold["metrics"][0]["loss"]
    assert warm["metrics"][1]["loss"] != cold["metrics"][1]["loss"]
    assert (cold["state"]["optimizer_updates"], warm["state"]["optimizer_updates"]) == (4, 7)
    told = ["method/reptile/displacement" in record for record in warm["metrics"]]
    assert told == [False, True, False, True]


def test_rows_that_were_never_trained_are_told(exported, data, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "odd"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][[3, 65]] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = runs.trained(config_from(folder, data, tmp_path))
    assert "embedding.weight: 2 of 67 rows are zero or nearly so (3, 65)" in told
    entries = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert f"the tokenizer has {len(entries)} entries, the embedding 67 rows: padding" in told or len(entries) == 67


def test_corpora_of_another_tokenizer_than_the_folders_are_refused(exported, data, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["model"]["merges"] = plain["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    ((status, told),) = runs.cpt("train", config_from(folder, data, tmp_path))
    assert status == 2 and f"was built with another tokenizer than {folder}; build it with that one" in told
    assert not (tmp_path / "run").exists()


def test_a_parent_and_a_folder_at_once_and_moments_that_a_folder_has_not_are_refused(base, exported, data, tmp_path):
    config = config_from(exported, data, tmp_path, optimizer_state="keep")
    ((status, told),) = runs.cpt("train", config, f"parent.run={base}")
    assert status == 2
    assert f"parent.run = {base} and weights = {exported}: a run begins from one of them" in told
    assert "optimizer_state = keep: a Hugging Face folder holds no moments; use reset or warm(100)" in told
    ((status, told),) = runs.cpt("train", config, "optimizer_state=warm")
    assert status == 2 and "optimizer_state = warm: keep, reset, or warm(n) with n steps, at least 1" in told


def test_the_latest_checkpoint_of_a_run_from_a_folder_exports_again(exported, data, tmp_path):
    runs.trained(config_from(exported, data, tmp_path))
    assert runs.cpt("convert", "to-hf", tmp_path / "run", tmp_path / "out")[0][0] == 0
    assert RunFolder(tmp_path / "run").latest().state["progress"]["step"] == 2
