"""The certificate and `verify` fail closed: one planted fault of each kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt.config.faults import Fault
from cpt.huggingface import certify, probe, publish, verify
from cpt.huggingface.architectures import llama as in_their_words
from cpt.huggingface.exported import Exported
from cpt.huggingface.probe import random_probe
from cpt.models.llama import Model, Settings
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

SMALL = Settings(vocabulary=131, width=48, layers=2, heads=6, kv_heads=2, mlp_width=72, rope_base=500.0,
                 initial_std=0.2, longest_sequence=64)  # fmt: skip
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    model = Model(SMALL, choose(KernelSettings(), torch.device("cpu")))
    model.initialise(5)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def folders(tmp_path, weights) -> tuple[Path, Path]:
    """The same model twice, the second to be spoilt."""
    for name in ("good", "spoilt"):
        publish("llama", SMALL, weights, tmp_path / name, dtype=torch.float32)
        (tmp_path / name / "certificate.json").unlink()
        (tmp_path / name / "tokenizer.model").write_text("stands for a tokenizer")
    return tmp_path / "good", tmp_path / "spoilt"


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **lines) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **lines}))


def certify_again(weights: dict[str, torch.Tensor], folder: Path, settings: Settings = SMALL) -> dict:
    return certify(Exported("llama", settings, weights, torch.float32), folder, random_probe(131, 64))


def swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = list(range(len(tensor)))
    rows[3], rows[4] = rows[4], rows[3]
    return tensor[rows]


def flip_one_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1).view(torch.int32)[1000] ^= 1
    return tensor


SPOILT_TENSORS = {
    "swapped rows": (swap_rows, "96 of 2304 values differ, the first at [3, 0]"),
    "transposed matrix": (lambda tensor: tensor.T, "values differ, the first at [0, 1]"),
    "one bit": (flip_one_bit, "1 of 2304 values differ, the first at [20, 40]"),
    "lower precision": (lambda tensor: tensor.bfloat16(), "bfloat16 in place of float32"),
}


@pytest.mark.parametrize("case", SPOILT_TENSORS)
def test_a_spoilt_tensor_is_named_and_there_is_no_certificate(folders, weights, case):
    good, spoilt = folders
    change, message = SPOILT_TENSORS[case]
    change_tensor(spoilt, QUERY, change)
    with pytest.raises(Fault) as raised:
        certify_again(weights, spoilt)
    assert f"tensor {QUERY} is not the trained blocks.1.attention.query.weight: " in str(raised.value)
    assert message in str(raised.value)
    assert not (spoilt / "certificate.json").exists()
    (line,) = verify(good, spoilt)
    assert line.startswith(f"tensor {QUERY}: ") and message in line


def test_an_unspoilt_folder_is_certified_and_verified(folders, weights):
    good, spoilt = folders
    assert certify_again(weights, spoilt) == json.loads((spoilt / "certificate.json").read_text())
    assert verify(good, spoilt) == []


def test_a_wrong_rotary_base_in_the_config_is_found(folders, weights):
    good, spoilt = folders
    change_config(spoilt, rope_theta=501.0, rope_parameters={"rope_theta": 501.0, "rope_type": "default"})
    with pytest.raises(Fault, match=r"config\.json says rope_theta = 501\.0; the trained model has 500\.0"):
        certify_again(weights, spoilt)
    assert "config.json: rope_theta: 501.0 in place of 500.0" in verify(good, spoilt)


def test_a_vocabulary_that_is_one_too_large_is_found(folders, weights):
    good, spoilt = folders
    change_config(spoilt, vocab_size=132)
    message = r"lm_head\.weight has shape \(131, 48\); config\.json says \(132, 48\)"
    with pytest.raises(Fault, match=message):
        certify_again(weights, spoilt)
    with pytest.raises(Fault, match=message):
        verify(good, spoilt)


def test_a_folder_of_another_model_is_found(folders, weights, tmp_path):
    good, _ = folders
    shallow = dataclasses.replace(SMALL, layers=1)
    fewer = {name: weight for name, weight in weights.items() if not name.startswith("blocks.1.")}
    publish("llama", shallow, fewer, tmp_path / "shallow", dtype=torch.float32)
    lines = verify(good, tmp_path / "shallow")
    assert "config.json: num_hidden_layers: 1 in place of 2" in lines
    assert f"tensor {QUERY}: only in the first model" in lines
    assert "tensor lm_head.weight: only in the first model" not in lines


def test_another_tokenizer_is_found(folders):
    good, spoilt = folders
    (spoilt / "tokenizer.model").write_text("stands for another tokenizer")
    (line,) = verify(good, spoilt)
    assert line.startswith("tokenizer file tokenizer.model: ")


def test_trained_weights_of_other_names_are_found(folders, weights):
    _, spoilt = folders
    with pytest.raises(Fault, match=r"weight anchor is not part of the model that the settings describe"):
        certify_again({**weights, "anchor": torch.zeros(1)}, spoilt)


def test_names_mapped_wrongly_both_ways_are_found_by_the_probe(tmp_path, weights, monkeypatch):
    """Every tensor equals its twin then, and only transformers can tell that gate and up have changed places."""
    names = in_their_words._IN_A_BLOCK
    swapped = {**names, "mlp.gate": names["mlp.up"], "mlp.up": names["mlp.gate"]}
    monkeypatch.setattr(in_their_words, "_IN_A_BLOCK", swapped)
    with pytest.raises(
        Fault, match="transformers computes something else from the same tensors .*: the logits differ by up to"
    ) as raised:
        publish("llama", SMALL, weights, tmp_path / "model", dtype=torch.float32)
    assert f"{tmp_path / 'model'}: " in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_equal_logits_with_another_loss_do_not_pass(tmp_path, weights, monkeypatch):
    """The limit on the loss stands by itself: a small shift of all logits of one token escapes the one on logits."""
    monkeypatch.setattr(probe, "LARGEST_LOGIT_DIFFERENCE", float("inf"))
    names = in_their_words._IN_A_BLOCK
    swapped = {**names, "mlp.gate": names["mlp.up"], "mlp.up": names["mlp.gate"]}
    monkeypatch.setattr(in_their_words, "_IN_A_BLOCK", swapped)
    with pytest.raises(
        Fault, match=r"something else from the same tensors .*: the losses are .* and .*; allowed difference 0\.001"
    ):
        publish("llama", SMALL, weights, tmp_path / "model", dtype=torch.float32)


def test_a_tensor_that_transformers_misses_is_told(folders, weights, monkeypatch):
    """Our reader finds it; theirs, which looks elsewhere, must find it too."""
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def forgetful(*positional, **named):
        model, told = real(*positional, **named)
        return model, {**told, "missing_keys": {"lm_head.weight"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forgetful)
    with pytest.raises(Fault, match=r"transformers reports missing keys: lm_head\.weight"):
        certify_again(weights, folders[1])
