"""A run whose model takes up a larger vocabulary: begun from a folder, gone on with, and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from cpt_harness import runs

from cpt.checkpoint import RunFolder
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface.load import read_folder
from cpt.run import beginning

STEPS = 4


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert runs.cpt("convert", "to-hf", base, folder, "--dtype", "fp32")[0][0] == 0
    return folder


@pytest.fixture(scope="module")
def larger(exported, tmp_path_factory) -> Path:
    """The exported tokenizer with a few more tokens."""
    folder = tmp_path_factory.mktemp("larger")
    (folder / "new.txt").write_text("dog fox dog fox jumps fox quick dog lazy fox dogfox " * 30)
    entries = Tokenizer.open(exported).vocabulary_size + 2
    words = ("data", "tokenizer", folder / "new.txt", "--extend", exported, "--output", folder / "tokenizer")
    ((status, told),) = runs.cpt(*words, "--vocab-size", entries)
    assert status == 0, told
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def config(exported, larger, tmp_path_factory) -> Path:
    """For the first half of its steps only new rows learn."""
    folder = tmp_path_factory.mktemp("grown")
    runs.write_corpus(folder / "code", larger, 5000, 11, 7)
    runs.write_corpus(folder / "held-out", larger, 400, 21, 7)
    plain = runs.settings(folder, folder / "run", [runs.stage(folder, "code", STEPS)])
    first = STEPS // 2 * runs.TOKENS_A_STEP
    plain["model"] = {"from": str(exported), "vocabulary": {"grow_to": str(larger), "train_new_rows_first": first}}
    plain["evaluation"] = {"held_out": {"code": str(folder / "held-out")}, "windows": 0}
    plain["checkpoint"] = {"every_tokens": runs.TOKENS_A_STEP, "keep_last": 9}
    plain["methods"] = [{"name": "reptile", "every": 3, "step_size": 0.5}]
    return runs.write_settings(folder / "run.yaml", plain)


@pytest.fixture(scope="module")
def grown(config) -> Path:
    told = runs.trained(config)
    assert "in old tokens" in told
    return config.parent / "run"


def masters(run: Path, step: int) -> dict[str, torch.Tensor]:
    from cpt.checkpoint import Checkpoint

    checkpoint = Checkpoint(RunFolder(run).checkpoint_at(step))
    return {n: checkpoint.read("master", n).reshape(checkpoint.shapes[n]) for n in checkpoint.shapes}


def test_old_rows_and_all_else_wait_while_the_new_rows_learn(grown, exported):
    _, settings, before = read_folder(exported)
    waiting, learned = masters(grown, STEPS // 2), masters(grown, STEPS)
    entries = Tokenizer.open(exported).vocabulary_size
    for name in settings.shapes:
        is_grown = name in ("embedding.weight", "head.weight")
        old = before[name][:entries] if is_grown else before[name]
        assert torch.equal(waiting[name][:entries] if is_grown else waiting[name], old), name
        assert not torch.equal(learned[name][:entries] if is_grown else learned[name], old), name
    assert waiting["head.weight"].shape == (entries + 2, runs.MODEL["width"])
    first = masters(grown, 1)["head.weight"][entries:]
    assert not torch.equal(first, waiting["head.weight"][entries:])


def test_its_folder_and_its_export_have_the_larger_vocabulary(grown, larger, tmp_path):
    plain = yaml.safe_load((grown / "run.yaml").read_text())
    entries = Tokenizer.open(larger).vocabulary_size
    assert plain["model"]["vocabulary"] == entries
    assert [method["name"] for method in plain["methods"]] == ["new_rows_first", "reptile"]
    assert Tokenizer.open(grown / "tokenizer").hash == Tokenizer.open(larger).hash
    ((status, told),) = runs.cpt("convert", "to-hf", grown, tmp_path / "out")
    assert status == 0, told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == entries
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (larger / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_while_the_new_rows_learn_it_goes_on_the_same(config, grown, tmp_path, ranks):
    words = (config, f"output={tmp_path / 'run'}")
    runs.cpt("train", *words, "zero=3", ranks=ranks, before=runs.ask_to_stop_at(1))
    runs.trained(*words)
    found, expected = masters(tmp_path / "run", STEPS), masters(grown, STEPS)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, atol=1e-5), name


@pytest.mark.parametrize("num_tokens", [2, 6])
@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_old_tokens_that_the_ranks_cannot_share_are_cut_down_or_come_again(
    config, even, tmp_path, monkeypatch, axis, num_tokens
):
    really = beginning._in_old_tokens
    monkeypatch.setattr(beginning, "_in_old_tokens", lambda run, tokens: really(run, tokens)[:, :num_tokens])
    words = (f"model.from={even}", f"mesh.{axis}=2", f"output={tmp_path / 'run'}")
    assert "in old tokens" in runs.trained(config, *words, ranks=2)


def test_corpora_of_the_old_tokenizer_are_refused(config, data, tmp_path):
    words = (f"stages.0.sources.code.corpus={data / 'code'}", f"output={tmp_path / 'run'}")
    ((status, told),) = runs.cpt("train", config, *words)
    assert status == 2 and "was built with another tokenizer than" in told


def test_growth_without_weights_is_refused(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 1)], growth={"grow_to": "x"})
    ((status, told),) = runs.cpt("train", runs.write_settings(tmp_path / "run.yaml", plain))
    assert status == 2 and "growth: only weights that are there can grow; name them as model: {from: FOLDER" in told
