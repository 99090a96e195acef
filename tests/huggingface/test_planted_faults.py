"""Each way in which a conversion goes wrong is caught, by name: when it is verified, and when it is certified."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpt_harness.parity import VARIANTS, build_model
from cpt_harness.runs import write_tokenizer
from safetensors.torch import load_file, save_file

from cpt.config import Fault, name_of_choice
from cpt.huggingface import certify, examine, publish
from cpt.huggingface.exported import Exported
from cpt.huggingface.probe import random_probe
from cpt.huggingface.verify import Subject

QWEN2, PYTHIA = VARIANTS["llama: Qwen2, wide heads"], VARIANTS["pythia: parallel"]
BLOCK, LAYER = "model.layers.1.self_attn", "gpt_neox.layers.1.attention"
HALF = 7  # of a head of 14


def weights_of(settings) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in build_model(settings).named_parameters()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("exported")
    tokenizer = write_tokenizer(parent / "tokenizer")
    for name, settings in (("qwen2", QWEN2), ("pythia", PYTHIA)):
        publish(name_of_choice(settings), settings, weights_of(settings), parent / name, dtype=torch.float32,
                tokenizer_folder=tokenizer)  # fmt: skip
    return {"qwen2": parent / "qwen2", "pythia": parent / "pythia"}


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def config(**lines) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**plain, **lines}))

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [spoil(folder) for spoil in spoils]


def swap_rows(values: torch.Tensor) -> torch.Tensor:
    return values[[1, 0, *range(2, len(values))]]


def interleave(values: torch.Tensor) -> torch.Tensor:
    """Rows of each head a0 b0 a1 b1 ..., as Meta's files have them, in place of a0 a1 ... b0 b1 ..."""
    return values.unflatten(0, (-1, 2, HALF)).transpose(1, 2).flatten(0, 2)


def one_bit(folder: Path) -> None:
    file = folder / "tokenizer.json"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)


NEW_BASE = {"rope_theta": 501.0, "rope_parameters": {"rope_theta": 501.0, "rope_type": "default"}}
# Model, how it is spoilt, what is told.
PLANTED = {
    "swapped rows": ("qwen2", tensor(f"{BLOCK}.k_proj.weight", swap_rows), f"tensor {BLOCK}.k_proj.weight"),
    "swapped rows in a fused tensor": (
        "pythia", tensor(f"{LAYER}.query_key_value.weight", swap_rows), f"tensor {LAYER}.query_key_value.weight"),
    "swapped heads of a fused tensor": (
        "pythia", tensor(f"{LAYER}.query_key_value.weight", lambda values: values.roll(36, 0)),
        f"tensor {LAYER}.query_key_value.weight"),
    "transposed matrix": ("pythia", tensor(f"{LAYER}.dense.weight", lambda values: values.T),
                          f"tensor {LAYER}.dense.weight"),
    "interleaved query": ("qwen2", tensor(f"{BLOCK}.q_proj.weight", interleave), f"tensor {BLOCK}.q_proj.weight"),
    "interleaved key": ("qwen2", tensor(f"{BLOCK}.k_proj.weight", interleave), f"tensor {BLOCK}.k_proj.weight"),
    "one row too few": (
        "qwen2", both(tensor("model.embed_tokens.weight", lambda v: v[:-1]), tensor("lm_head.weight", lambda v: v[:-1]),
                      config(vocab_size=130)),
        "tensor model.embed_tokens.weight: shape (130, 48) in place of (131, 48)"),
    "one token too many": ("qwen2", config(vocab_size=132),
                           "model.embed_tokens.weight has shape (131, 48); config.json says (132, 48)"),
    "rows moved by one": ("qwen2", tensor("model.embed_tokens.weight", lambda values: values.roll(1, 0)),
                          "tensor model.embed_tokens.weight"),
    "rotary base": ("qwen2", config(**NEW_BASE), "config.json: rope_theta: 501.0 in place of 500.0"),
    "rotary share": ("pythia", config(rotary_pct=1.0, rope_parameters={
        "rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 1.0}),
        "config.json: rotary_pct: 1.0 in place of 0.5"),
    "missing bias": ("qwen2", tensor(f"{BLOCK}.v_proj.bias", lambda values: None),
                     f"tensor {BLOCK}.v_proj.bias is missing"),
    "bias of zeros": ("qwen2", tensor(f"{BLOCK}.v_proj.bias", torch.zeros_like), f"tensor {BLOCK}.v_proj.bias"),
    "tied, with another head in the file": (
        "qwen2", config(tie_word_embeddings=True),
        "config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ"),
    "tied, without a head": (
        "qwen2", both(tensor("lm_head.weight", lambda values: None), config(tie_word_embeddings=True)),
        "tensor lm_head.weight: only in the first model"),
    "not a number": ("qwen2", tensor("model.norm.weight", lambda values: values * float("nan")),
                     "tensor model.norm.weight"),
    "lower precision": ("qwen2", tensor("model.norm.weight", lambda values: values.bfloat16()),
                        "tensor model.norm.weight: bfloat16 in place of float32"),
    "tokenizer": ("qwen2", one_bit, "tokenizer file tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("of_ours", [False, True], ids=["against a folder", "against the weights"])
@pytest.mark.parametrize("case", PLANTED)
def test_verify_names_what_was_spoilt(case, of_ours, exported, tmp_path):
    model, spoil, told = PLANTED[case]
    right = Subject.of_folder(exported[model])
    if of_ours:
        settings = {"qwen2": QWEN2, "pythia": PYTHIA}[model]
        right = Subject(name_of_choice(settings), settings, weights_of(settings), exported[model])
    if of_ours and case == "lower precision":
        told = "tensor model.norm.weight"  # compared in the folder's type, in which nothing is lost
    spoilt = Path(shutil.copytree(exported[model], tmp_path / "spoilt"))
    spoil(spoilt)
    try:
        lines = examine(right, Subject.of_folder(spoilt)).differences
    except Fault as fault:
        lines = list(fault.lines)
    if of_ours and case == "lower precision":
        assert all("norm.weight" not in line for line in lines)
    else:
        assert any(told in line for line in lines)
        unrelated = [line for line in lines if line.startswith("tensor ") and told.split(":")[0] not in line]
        assert unrelated == [] or case in ("one row too few",)


@pytest.mark.parametrize("case", [case for case in PLANTED if case != "tokenizer"])
def test_nothing_that_was_spoilt_is_certified(case, exported, tmp_path):
    model, spoil, told = PLANTED[case]
    settings = {"qwen2": QWEN2, "pythia": PYTHIA}[model]
    spoilt = Path(shutil.copytree(exported[model], tmp_path / "spoilt"))
    (spoilt / "certificate.json").unlink()
    spoil(spoilt)
    trained = Exported(name_of_choice(settings), settings, weights_of(settings), torch.float32)
    with pytest.raises(Fault):
        certify(trained, spoilt, random_probe(131, 64))
    assert not (spoilt / "certificate.json").exists()


@pytest.mark.parametrize("model", ["qwen2", "pythia"])
def test_what_is_whole_is_the_same_and_the_logits_say_so_too(model, exported):
    settings = {"qwen2": QWEN2, "pythia": PYTHIA}[model]
    ours = Subject(name_of_choice(settings), settings, weights_of(settings), exported[model])
    folder = Subject.of_folder(exported[model])
    for pair in ((ours, folder), (folder, ours), (folder, folder), (ours, ours)):
        verdict = examine(*pair)
        assert verdict.differences == [] and verdict.rows_removed == 0
        assert verdict.probe.top_1_agreement == 1.0 and verdict.probe.loss_difference < 1e-5
    assert verdict.num_tensors == len(Exported(name_of_choice(settings), settings, ours.weights, torch.float32).tensors)


def test_a_wrong_rotary_base_changes_the_logits(exported, tmp_path):
    spoilt = Path(shutil.copytree(exported["qwen2"], tmp_path / "spoilt"))
    config(**NEW_BASE)(spoilt)
    probe = examine(Subject.of_folder(exported["qwen2"]), Subject.of_folder(spoilt)).probe
    assert probe.faults()


def test_rows_that_a_certificate_says_were_removed_are_no_difference(tmp_path):
    settings = dataclasses.replace(QWEN2, vocabulary=140)
    weights = weights_of(settings)
    certificate = publish("llama", settings, weights, tmp_path / "cut", dtype=torch.bfloat16, vocabulary=131)
    assert certificate["rows_removed"] == 9
    assert load_file(tmp_path / "cut/model.safetensors")["lm_head.weight"].shape == (131, 48)
    ours, cut = Subject("llama", settings, weights, None), Subject.of_folder(tmp_path / "cut")
    verdict = examine(ours, cut)
    assert verdict.differences == [] and verdict.rows_removed == 9
    (tmp_path / "cut/certificate.json").unlink()
    assert "config.json: vocab_size: 131 in place of 140" in examine(ours, cut).differences


@pytest.mark.parametrize("vocabulary", [0, 132])
def test_rows_that_are_not_there_cannot_be_kept(tmp_path, vocabulary):
    message = f"vocabulary = {vocabulary}: the model has 131 rows, of which at least 1 is kept"
    with pytest.raises(Fault, match=message):
        publish("llama", QWEN2, weights_of(QWEN2), tmp_path / "cut", dtype=torch.bfloat16, vocabulary=vocabulary)


def test_a_probe_of_other_tokens_is_refused(exported):
    folder = Subject.of_folder(exported["qwen2"])
    with pytest.raises(Fault, match="the probe text has token 131, the models have 131 rows"):
        examine(folder, folder, torch.full((1, 5), 131))
