"""Logits layer by layer are those of the whole model, for every variant, ours and theirs, and hold little in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpt_harness.parity import VARIANTS, build_model, tokens_of
from safetensors.torch import load_file, save_file

from cpt.config import Fault, name_of_choice
from cpt.huggingface import forward, probe, publish
from cpt.huggingface.readers import InMemory

ONE_OF_EACH = ("llama: grouped heads", "llama: Qwen2", "llama: rope llama3", "pythia: parallel", "pythia: tied")


def publish_variant(variant: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    settings = VARIANTS[variant]
    weights = {name: parameter.detach() for name, parameter in build_model(settings).named_parameters()}
    return weights, publish(name_of_choice(settings), settings, weights, folder, dtype=torch.float32)


def all_logits(model: forward.Forward, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([part for _, part in model.logits(model.hidden(tokens))], dim=-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_by_layer_is_the_whole_model(variant, tmp_path, monkeypatch):
    settings = VARIANTS[variant]
    weights, _ = publish_variant(variant, tmp_path / "model")
    tokens = tokens_of(settings, 2, 20)[:, :-1]
    with torch.no_grad():
        expected = build_model(settings)(tokens)
    # Parts of the head that do not divide the vocabulary.
    monkeypatch.setattr(forward, "_HEAD_BYTES", 4 * settings.width * 20)
    ours = forward.of_ours(name_of_choice(settings), settings, lambda name: InMemory(weights[name]))
    theirs = forward.of_folder(tmp_path / "model", in_layers=True)
    for model in (ours, theirs):
        assert len(list(model.logits(model.hidden(tokens)))) > 1
        assert (all_logits(model, tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_a_large_model_is_certified_without_ever_being_loaded(variant, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def loads(*_, **__):
        raise AssertionError("loaded as a whole")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(probe, "IN_LAYERS_FROM_PARAMETERS", 1)
    _, certificate = publish_variant(variant, tmp_path / "model")
    assert certificate["probe"]["in_layers"] and certificate["probe"]["tokens"] == 2 * 32
    assert certificate["probe"]["top_1_agreement"] == 1.0


def test_a_module_keeps_nothing_after_its_turn(tmp_path):
    publish_variant("llama: grouped heads", tmp_path / "model")
    model = forward.of_folder(tmp_path / "model", in_layers=True)
    all_logits(model, torch.arange(6)[None])
    assert all(parameter.is_meta for parameter in model._model.parameters())


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop(QUERY), f"transformers reports missing keys: {QUERY}"),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), "transformers reports unexpected keys: extra"),
    (lambda tensors: tensors.update({QUERY: torch.zeros(2, 48)}), f"transformers reports mismatched keys: {QUERY}"),
], ids=["missing", "unexpected", "misshapen"])  # fmt: skip
def test_tensors_that_transformers_would_not_take_are_told_layer_by_layer_too(tmp_path, change, message):
    publish_variant("llama: grouped heads", tmp_path / "model")
    spoil(tmp_path / "model", change)
    with pytest.raises(Fault, match=message):
        forward.of_folder(tmp_path / "model", in_layers=True)


def test_losses_and_agreement_in_parts_are_those_of_whole_logits():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(131, (2, 8), generator=generator)
    logits = [torch.randn(2, 7, 131, generator=generator) for _ in range(2)]

    class Fixed:
        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def hidden(self, _: torch.Tensor) -> torch.Tensor:
            return self.values

        def logits(self, values: torch.Tensor):
            return ((first, values[..., first : first + 50]) for first in range(0, 131, 50))

    found = probe.compare([Fixed(values) for values in logits], tokens, in_layers=True)
    for loss, values in zip(found.losses, logits, strict=True):
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(values.mT, tokens[:, 1:]).item(), rel=1e-6)
    assert found.largest_logit_difference == (logits[0] - logits[1]).abs().max().item()
    assert found.largest_logit == logits[0].abs().max().item()
    assert found.top_1_agreement == (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    assert len(found.faults()) == 2


def test_logits_that_are_not_numbers_break_the_limits():
    assert len(probe.Probe(1, 1, (1.0, float("nan")), 1.0, float("nan"), 1.0).faults()) == 2
