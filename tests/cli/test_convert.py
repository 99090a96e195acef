"""Out to Hugging Face and in again: the same bytes, a parent that a child goes on from, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cpt_harness import runs
from safetensors import safe_open

from cpt.checkpoint import RunFolder
from cpt.cli import main
from cpt.cli.convert import num_bytes
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface import read_folder


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
    assert "SAME: configuration, all 21 tensors bit for bit, and the tokenizer's files" in capsys.readouterr().out
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
        parent={"run": str(imported)}, sequence_length=runs.LENGTH, **more,
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
    # And it goes out, whatever number of ranks its checkpoint lies in pieces of.
    checkpoint = RunFolder(tmp_path / "grandchild").latest()
    assert len(list(checkpoint.folder.glob("pieces-*"))) == ranks
    folder = converted("to-hf", tmp_path / "grandchild", tmp_path / "out", "--dtype", "fp32")
    _, _, weights = read_folder(folder)
    assert all((weights[name] == values).all() for name, values in checkpoint.weights().items())


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
    assert "no model is here; name a run folder" in refused(capsys, "verify", exported, tmp_path)
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
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    told = refused(capsys, "from-hf", exported, tmp_path / "parent")
    assert told == f"cpt convert: {tmp_path / 'parent'} cannot be written: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


# ---- layout, types and rows


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def theirs(request, data, tmp_path_factory) -> Path:
    """A folder in bf16 as transformers itself writes it, in several files, with words of its own for generation."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    lines = {"vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
             "num_attention_heads": 3, "max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**lines)).bfloat16()
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2],   "temperature": 0.6}\n')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / "tokenizer" / name, folder / name)
    return folder


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob(pattern)}


def converted(way: str, source: Path, target: Path, *more: str) -> Path:
    assert main(["convert", way, str(source), str(target), *more]) == 0
    return target


def test_a_folder_of_transformers_comes_out_again_as_the_same_bytes(theirs, tmp_path, capsys):
    parent = converted("from-hf", theirs, tmp_path / "parent")
    again = converted("to-hf", parent, tmp_path / "again")
    assert "(bf16)" in capsys.readouterr().out, "the type that it came in"
    for pattern in ("*.safetensors", "*.index.json", "generation_config.json", "tokenizer*"):
        assert hashes(again, pattern) == hashes(theirs, pattern)
    for a, b in ((theirs, again), (theirs, parent), (parent, again), (again, parent)):
        assert main(["convert", "verify", str(a), str(b)]) == 0
    certificate = json.loads((again / "certificate.json").read_text())
    assert certificate["dtype"] == "bfloat16" and certificate["left_out"] == []
    assert certificate["probe"]["loss_trained"] == certificate["probe"]["loss_trained_rounded"]


def test_another_type_or_shard_size_gives_other_files_of_the_same_model(theirs, tmp_path):
    parent = converted("from-hf", theirs, tmp_path / "parent")
    wide = converted("to-hf", parent, tmp_path / "wide", "--dtype", "fp32")
    assert hashes(wide, "*.safetensors").keys() == hashes(theirs, "*.safetensors").keys(), "the files that they lay in"
    cut = converted("to-hf", parent, tmp_path / "cut", "--max-shard-size", "6kB")
    assert len(hashes(cut, "*.safetensors")) > len(hashes(theirs, "*.safetensors"))
    assert main(["convert", "verify", str(theirs), str(cut)]) == 0
    assert main(["convert", "verify", str(theirs), str(wide)]) == 1
    assert main(["convert", "verify", str(parent), str(wide)]) == 0


def test_an_imported_checkpoint_holds_the_weights_in_the_type_they_came_in_and_gives_fp32(theirs, tmp_path):
    checkpoint = RunFolder(converted("from-hf", theirs, tmp_path / "parent")).latest()
    num_bytes = sum(file.stat().st_size for file in theirs.glob("*.safetensors"))
    assert (checkpoint.folder / "pieces-00000.safetensors").stat().st_size < 1.2 * num_bytes
    assert all(weight.dtype is torch.float32 for weight in checkpoint.weights().values())


def test_rows_without_a_token_are_told_and_removed_when_asked(theirs, tmp_path, capsys):
    parent = converted("from-hf", theirs, tmp_path / "parent")
    num_tokens = Tokenizer.open(theirs).vocabulary_size
    converted("to-hf", parent, tmp_path / "all")
    told = f"{70 - num_tokens} of 70 rows have no token, and are kept; --vocabulary tokenizer removes them"
    assert told in capsys.readouterr().out
    cut = converted("to-hf", parent, tmp_path / "cut", "--vocabulary", "tokenizer")
    assert f"{70 - num_tokens} rows without a token removed" in capsys.readouterr().out
    assert json.loads((cut / "config.json").read_text())["vocab_size"] == num_tokens
    assert main(["convert", "verify", str(parent), str(cut)]) == 0
    assert f"{70 - num_tokens} rows without a token removed" in capsys.readouterr().out
    assert main(["convert", "verify", str(theirs), str(cut)]) == 1, "two folders must agree in everything"
    assert "expected a number of rows" in refused(capsys, "to-hf", parent, tmp_path / "no", "--vocabulary", "many")
    told = refused(capsys, "to-hf", parent, tmp_path / "no", "--vocabulary", "5")
    assert f"the tokenizer has {num_tokens} tokens, the model 5" in told
    shutil.rmtree(parent / "tokenizer")
    told = refused(capsys, "to-hf", parent, tmp_path / "no", "--vocabulary", "tokenizer")
    assert "the run has no tokenizer folder; give a number" in told


def test_weights_that_are_no_numbers_are_not_imported(theirs, tmp_path, capsys):
    spoilt = Path(shutil.copytree(theirs, tmp_path / "spoilt"))
    file = sorted(spoilt.glob("*.safetensors"))[-1]
    raw = bytearray(file.read_bytes())
    raw[-2:] = b"\xc0\x7f"  # NaN in bf16
    file.write_bytes(raw)
    assert "1 values or more are NaN or infinite" in refused(capsys, "from-hf", spoilt, tmp_path / "parent")
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_a_tokenizer_that_asks_for_rows_that_are_not_there_is_not_imported(exported, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    small = Path(shutil.copytree(exported, tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    tensors = load_file(small / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:20].clone()
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    assert "tokens, the model 20; another one?" in refused(capsys, "from-hf", small, tmp_path / "parent")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_damaged_import_json_is_told(theirs, tmp_path, capsys):
    parent = converted("from-hf", theirs, tmp_path / "parent")
    (parent / "import.json").write_text('{"format_version": 1}')
    told = refused(capsys, "to-hf", parent, tmp_path / "out")
    assert "import.json is damaged" in told and "remove it, and the files get a layout of their own" in told


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4GiB", 4 << 30), ("77", 77)])
def test_sizes_are_read_in_words(text, size):
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "0", "5 XB", "-1GB"])
def test_a_size_that_is_none_is_refused(text, exported, tmp_path, capsys):
    assert main(["convert", "to-hf", str(exported), str(tmp_path / "out"), f"--max-shard-size={text}"]) == 2
    assert "expected a size such as 5GB or 500MB" in capsys.readouterr().err


# ---- verify


def test_a_run_its_checkpoints_and_their_exports_can_all_be_compared(child, exported, tmp_path, capsys):
    newest = RunFolder(child).latest().folder
    for a, b in ((child, exported), (newest, exported), (exported, child), (child, newest)):
        assert main(["convert", "verify", str(a), str(b)]) == 0
        told = capsys.readouterr().out
        assert "SAME" in told and "top-1 agreement 100.00%" in told
    low = converted("to-hf", child, tmp_path / "low", "--dtype", "bf16")
    assert main(["convert", "verify", str(child), str(low)]) == 0
    assert main(["convert", "verify", str(low), str(child)]) == 1, "the run is not what rounding left of it"
    assert "tensor model.embed_tokens.weight: " in capsys.readouterr().out


def test_the_export_is_told_once(child, tmp_path, capsys):
    converted("to-hf", child, tmp_path / "model")
    told = capsys.readouterr()
    assert (told.out + told.err).count("exported ") == 1


# ---- what others do with it


def test_transformers_takes_the_folder_without_any_flag(theirs, child, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    parent = converted("from-hf", theirs, tmp_path / "parent")
    for model in (parent, child):
        folder = converted("to-hf", model, tmp_path / f"out-{model.name}")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        ids = AutoTokenizer.from_pretrained(folder)("the quick fox", return_tensors="pt").input_ids
        assert loaded(ids).logits.isfinite().all()
        (written,) = pipeline("text-generation", model=str(folder))("the quick", max_new_tokens=4, do_sample=False)
        assert written["generated_text"].startswith("the quick")
