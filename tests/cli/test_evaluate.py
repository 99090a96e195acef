"""`cpt evaluate` gives a run's own scores again, from its folder, a checkpoint, or what was exported of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from cpt_harness import runs

from cpt.cli import main


@pytest.fixture(scope="session")
def exported(child, tmp_path_factory) -> Path:
    """The child as a Hugging Face folder in fp32."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["convert", "to-hf", str(child), str(folder)]) == 0
    return folder


def scores(capsys, *words: object) -> dict:
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["scores"]


def refused(capsys, *words: object) -> str:
    assert main(["evaluate", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def last_scores(run: Path) -> dict[str, dict]:
    return {record["source"]: record for record in runs.lines(run / "scores.jsonl")[-2:]}


def assert_same_scores(found: dict, run: Path) -> None:
    own = last_scores(run)
    assert found.keys() == own.keys()
    for name, score in found.items():
        assert score["loss"] == pytest.approx(own[name]["loss"], abs=1e-5)
        assert score["bits_per_byte"] == pytest.approx(own[name]["bits_per_byte"], abs=1e-5)
        assert score["tokens"] == own[name]["evaluated_tokens"]
        assert score["interval"] == pytest.approx(own[name]["interval"], abs=1e-5)
        assert score["interval_over"] == own[name]["interval_over"]


def test_a_run_is_scored_on_its_own_held_out_corpora_as_it_scored_itself(child, capsys):
    assert_same_scores(scores(capsys, child), child)


def test_a_checkpoint_and_an_exported_folder_get_the_same_scores(child, exported, data, capsys):
    assert_same_scores(scores(capsys, child / "checkpoints" / "step-00000016"), child)
    corpora = [data / "prose-held-out", data / "code-held-out"]
    found = scores(capsys, exported, "--corpora", *corpora, "--sequence-length", runs.LENGTH)
    assert_same_scores({name.removesuffix("-held-out"): score for name, score in found.items()}, child)


def test_an_earlier_checkpoint_gets_its_own_scores(child, capsys):
    earlier = scores(capsys, child / "checkpoints" / "step-00000015")["code"]["loss"]
    assert earlier != pytest.approx(last_scores(child)["code"]["loss"], abs=1e-6)


def test_the_table_has_a_line_for_each_corpus(child, capsys):
    assert main(["evaluate", str(child)]) == 0
    head, prose, code = capsys.readouterr().out.splitlines()
    assert head.split() == ["corpus", "loss", "95", "%", "over", "perplexity", "bits/byte", "tokens"]
    own = last_scores(child)["code"]
    assert prose.split()[0] == "prose" and f"{own['loss']:.4f}" in code
    assert f"±{own['interval']:.4f}" in code and own["interval_over"] in code


def test_windows_and_sequence_length_can_be_chosen(child, capsys):
    across = [child, "--attention", "across_documents"]  # every token of a window is scored
    assert scores(capsys, *across, "--windows", "5")["prose"]["tokens"] == 5 * runs.LENGTH
    assert scores(capsys, *across, "--windows", "3", "--sequence-length", "20")["code"]["tokens"] == 60


def test_attention_is_the_runs_setting_or_the_familys_custom_unless_asked_for(child, exported, data, tmp_path, capsys):
    across = copied_with_attention(child, tmp_path / "across", "across_documents")
    within = copied_with_attention(child, tmp_path / "within", "within_document")
    old = copied_with_attention(child, tmp_path / "old", None)  # Llama's custom: within
    of_across, of_within = scores(capsys, across), scores(capsys, within)
    for name in ("prose", "code"):
        assert of_across[name]["tokens"] > of_within[name]["tokens"]
        assert of_across[name]["loss"] != pytest.approx(of_within[name]["loss"], abs=1e-3)
    assert scores(capsys, old) == of_within
    assert scores(capsys, across, "--attention", "within_document") == of_within
    assert scores(capsys, within, "--attention", "across_documents") == of_across
    asked = [exported, "--corpora", data / "prose-held-out", "--sequence-length", runs.LENGTH]
    assert scores(capsys, *asked)["prose-held-out"] == pytest.approx(of_within["prose"], abs=1e-5)
    asked += ["--attention", "across_documents"]
    assert scores(capsys, *asked)["prose-held-out"] == pytest.approx(of_across["prose"], abs=1e-5)


def copied_with_attention(run: Path, target: Path, attention: str | None) -> Path:
    """A copy of the run whose settings say this of attention; None: nothing."""
    copy = runs.copy(run, target)
    plain = yaml.safe_load((copy / "run.yaml").read_text())
    plain.pop("attention", None)
    if attention:
        plain["attention"] = attention
    (copy / "run.yaml").write_text(yaml.safe_dump(plain))
    return copy


def test_two_corpora_of_one_name_are_both_scored(child, data, tmp_path, capsys):
    shutil.copytree(data / "code-held-out", tmp_path / "prose-held-out")
    found = scores(capsys, child, "--corpora", data / "prose-held-out", tmp_path / "prose-held-out")
    assert len(found) == 2
    assert sorted(s["loss"] for s in found.values()) == pytest.approx(
        sorted(s["loss"] for s in last_scores(child).values()), abs=1e-5
    )


def test_held_out_corpora_that_are_megatron_prefixes_are_found(child, data, tmp_path, capsys):
    run = runs.copy(child, tmp_path / "run")
    plain = yaml.safe_load((run / "run.yaml").read_text())
    plain["evaluation"]["held_out"] = {"prose": str(data / "prose-held-out" / "shard-00000")}
    (run / "run.yaml").write_text(yaml.safe_dump(plain))
    found = scores(capsys, run)["prose"]
    assert found["loss"] == pytest.approx(last_scores(child)["prose"]["loss"], abs=1e-5)
    assert found["bits_per_byte"] is None


def test_what_cannot_be_scored_is_told_in_a_line(child, exported, data, tmp_path, capsys):
    assert f"{tmp_path}: no model is here; name a run folder" in refused(capsys, tmp_path)
    assert "--corpora is not given, and no held-out corpus of the run is there" in refused(capsys, exported)
    assert "there is no corpus at" in refused(capsys, child, "--corpora", tmp_path / "gone")
    assert "--windows = -1" in refused(capsys, child, "--windows", "-1")
    assert "--sequence-length = 0" in refused(capsys, child, "--sequence-length", "0")
    assert "--sequence-length = 33: the model takes up to 32" in refused(capsys, child, "--sequence-length", "33")


def test_a_run_that_saved_nothing_and_a_checkpoint_without_its_run_are_told(child, tmp_path, capsys):
    shutil.copytree(child, tmp_path / "begun", ignore=shutil.ignore_patterns("step-*"))
    assert "the run has saved no checkpoint yet" in refused(capsys, tmp_path / "begun")
    shutil.copytree(child / "checkpoints" / "step-00000016", tmp_path / "lone" / "checkpoints" / "step-00000016")
    told = refused(capsys, tmp_path / "lone" / "checkpoints" / "step-00000016")
    assert f"{tmp_path / 'lone' / 'run.yaml'} is missing" in told


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_scored(child, tmp_path, capsys):
    run = runs.copy(child, tmp_path / "run")
    (run / "checkpoints" / "step-00000016" / "index.json").unlink()
    assert main(["evaluate", str(run), "--json"]) == 0
    found = capsys.readouterr()
    assert "step-00000016/index.json is missing" in found.err
    expected = scores(capsys, child / "checkpoints" / "step-00000015")
    assert json.loads(found.out)["scores"] == expected
