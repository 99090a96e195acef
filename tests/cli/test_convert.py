"""Out to Hugging Face and in again: the same bytes, a parent that a child goes on from, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cpt_harness import runs
from safetensors import safe_open

from cpt.checkpoint import RunFolder
from cpt.cli import main


@pytest.fixture(scope="module")
def exported(child, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["convert", "to-hf", str(child), str(folder), "--dtype", "fp32"]) == 0
    return folder


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "parent"
    assert main(["convert", "from-hf", str(exported), str(folder)]) == 0
    return folder


def refused(capsys, *words: object) -> str:
    assert main(["convert", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_the_export_says_where_it_lies_and_what_its_certificate_found(child, tmp_path, capsys):
    assert main(["convert", "to-hf", str(child), str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    assert f"exported {tmp_path / 'model'} (fp32)" in told, "the run's own precision"
    assert "top-1 agreement 100.00%" in told
    certificate = json.loads((tmp_path / "model" / "certificate.json").read_text())
    assert certificate["probe"]["loss_trained"] == pytest.approx(certificate["probe"]["loss_transformers"], abs=1e-5)


def test_the_weights_are_the_masters_of_the_last_checkpoint_and_the_tokenizer_is_byte_for_byte(child, exported, data):
    checkpoint = RunFolder(child).latest()
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert (file.get_tensor("model.embed_tokens.weight") == checkpoint.weights()["embedding.weight"]).all()
        assert (file.get_tensor("lm_head.weight") == checkpoint.weights()["head.weight"]).all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (data / "tokenizer" / name).read_bytes()


def test_out_and_in_and_out_again_is_the_same_model_to_the_bit(exported, imported, tmp_path, capsys):
    assert main(["convert", "to-hf", str(imported), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    capsys.readouterr()
    assert main(["convert", "verify", str(exported), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.startswith("SAME")
    assert (exported / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_checkpoint_can_be_exported_and_differs_from_another(child, exported, tmp_path, capsys):
    earlier = child / "checkpoints" / "step-00000015"
    assert main(["convert", "to-hf", str(earlier), str(tmp_path / "earlier"), "--dtype", "fp32"]) == 0
    capsys.readouterr()
    assert main(["convert", "verify", str(exported), str(tmp_path / "earlier")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "DIFFERENT" and any("tensor lm_head.weight" in line for line in told)


def test_an_imported_folder_is_a_finished_run_without_training(imported, data):
    run = RunFolder(imported)
    assert run.is_finished and run.latest().state["progress"]["step"] == 0
    tokenizers = [folder / "tokenizer" / "tokenizer.json" for folder in (imported, data)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    assert json.loads((imported / "lineage.json").read_text())["parent"] is None


def child_of(imported: Path, data: Path, tmp_path: Path, **more) -> Path:
    plain = runs.settings(
        data, tmp_path / "grandchild", [runs.stage(data, "code", 2)],
        parent={"run": str(imported), **more}, sequence_length=runs.LENGTH,
    )  # fmt: skip
    del plain["model"]
    return runs.write_settings(tmp_path / "grandchild.yaml", plain)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_child_of_an_imported_folder_starts_at_the_exported_models_loss(child, imported, data, tmp_path, ranks):
    runs.trained(child_of(imported, data, tmp_path), ranks=ranks)
    last, first = runs.lines(child / "scores.jsonl")[-2:], runs.lines(tmp_path / "grandchild" / "scores.jsonl")[:2]
    for above, below in zip(last, first, strict=True):
        assert below["step"] == 0 and below["source"] == above["source"]
        assert below["loss"] == pytest.approx(above["loss"], abs=1e-6)


def test_an_imported_folder_has_no_moments_to_keep(imported, data, tmp_path):
    config = child_of(imported, data, tmp_path, optimizer_state="keep")
    ((status, told),) = runs.cpt("train", config)
    assert status == 2 and "holds no moments to keep: an imported model has none" in told
    assert not (tmp_path / "grandchild").exists()


def test_a_used_folder_is_not_written_into(child, exported, imported, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert f"{tmp_path / 'used'} is in use" in refused(capsys, "to-hf", child, tmp_path / "used")
    assert f"{tmp_path / 'used'} is there already" in refused(capsys, "from-hf", exported, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_what_is_no_model_is_told_and_nothing_is_left(exported, tmp_path, capsys):
    assert "no model is here; name a run folder" in refused(capsys, "to-hf", tmp_path, tmp_path / "out")
    assert "is a Hugging Face folder already" in refused(capsys, "to-hf", exported, tmp_path / "out")
    assert "config.json is missing" in refused(capsys, "from-hf", tmp_path, tmp_path / "out")
    assert "config.json is missing" in refused(capsys, "verify", exported, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_lacks_a_tokenizer_is_told_and_leaves_nothing(exported, tmp_path, capsys):
    bare = Path(shutil.copytree(exported, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    told = refused(capsys, "from-hf", bare, tmp_path / "parent")
    assert "tokenizer" in told
    assert not (tmp_path / "parent").exists()


def test_a_damaged_export_is_not_imported(exported, tmp_path, capsys):
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is damaged" in refused(capsys, "from-hf", damaged, tmp_path / "parent")
    assert not (tmp_path / "parent").exists()


def test_a_full_disk_leaves_nothing_of_an_import(exported, tmp_path, monkeypatch, capsys):
    import cpt.checkpoint.write as write

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    assert main(["convert", "from-hf", str(exported), str(tmp_path / "parent")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "parent").exists()
