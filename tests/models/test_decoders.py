"""What all our models promise alike: shapes, cuts, weight decay, first values, and building on no memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpt_harness.parity import LLAMAS, PYTHIAS, VARIANTS, build_model, tokens_of

from cpt.config import as_mapping, build, read_settings
from cpt.models import llama, pythia
from cpt.models.layers.cuts import cut_of
from cpt_kernels import Documents, choose
from cpt_kernels import Settings as KernelSettings

CPU = torch.device("cpu")
RMS_NORM = dataclasses.replace(PYTHIAS["SiLU"], norm="rms_norm", attention_bias=False, mlp_bias=False)
ALL = {**VARIANTS, "pythia: RMSNorm, no biases": RMS_NORM}
TABLES = {llama: [*LLAMAS.values()], pythia: [*PYTHIAS.values(), RMS_NORM]}


@pytest.mark.parametrize("variant", ALL)
def test_settings_know_every_parameter_and_its_shape(variant):
    model = build_model(ALL[variant])
    actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(actual) == list(model.settings.shapes)
    assert actual == model.settings.shapes
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.__name__)
def test_every_parameter_has_one_cut_and_every_cut_a_parameter(file):
    names = {name for settings in TABLES[file] for name in settings.shapes}
    assert {cut_of(name, file.CUTS) for name in names} == {"column", "row", "vocabulary", "whole"}
    used = {name.replace(".0.", ".*.") for name in names if not name.startswith("blocks.1.")}
    assert used == set(file.CUTS)


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.__name__)
def test_cuts_leave_products_whole(file):
    """What a column cut parts is what the next row cut takes; all that adds to the stream has its bias whole."""
    for settings in TABLES[file]:
        for name, shape in settings.shapes.items():
            cut = cut_of(name, file.CUTS)
            if name.endswith(("output.weight", "down.weight")):
                assert cut == "row" and shape[0] == settings.width
            elif name.endswith(("output.bias", "down.bias")) or "norm" in name:
                assert cut == "whole" and shape == (settings.width,)
            elif len(shape) == 2:
                assert cut in ("column", "vocabulary") and shape[1] == settings.width


def test_matrices_decay_and_norms_and_biases_do_not():
    for settings in ALL.values():
        model = build_model(settings)
        for name, shape in settings.shapes.items():
            assert model.decays(name) == (len(shape) == 2), name


@pytest.mark.parametrize("variant", ["llama: tied", "llama: all biases", "pythia: tied", "pythia: parallel"])
def test_a_model_is_built_on_no_memory_and_then_filled_by_name(variant):
    settings = ALL[variant]
    with torch.device("meta"):
        model = build(settings, "Model", choose(KernelSettings(), CPU))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.materialise(CPU)
    assert (model.head.weight is model.embedding.weight) == settings.tied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.initial_value(name, 3))
    other = build(settings, "Model", choose(KernelSettings(), CPU))
    other.initialise(3)
    tokens = tokens_of(settings)
    assert torch.equal(model(tokens), other(tokens))


def test_initial_values_are_not_made_on_the_device_that_torch_is_told_to_use():
    model = build_model(PYTHIAS["parallel"])
    with torch.device("meta"):
        assert not any(model.initial_value(name, 1).is_meta for name in model.settings.shapes)


def test_pythia_begins_as_gpt_neox_does():
    settings = pythia.Settings(vocabulary=600, width=96, layers=8, heads=4)
    model = build(settings, "Model", choose(KernelSettings(), CPU))
    model.initialise(0)
    small, wang = math.sqrt(2 / (5 * 96)), 2 / (8 * math.sqrt(96))
    spreads = {"embedding.weight": small, "head.weight": small, "blocks.3.attention.value.weight": small,
               "blocks.3.mlp.up.weight": small, "blocks.3.attention.output.weight": wang,
               "blocks.3.mlp.down.weight": wang}  # fmt: skip
    for name, spread in spreads.items():
        assert model.get_parameter(name).std().item() == pytest.approx(spread, rel=0.03), name
    assert model.get_parameter("blocks.3.mlp.up.bias").abs().max() == 0
    assert torch.equal(model.get_parameter("blocks.3.mlp_norm.weight"), torch.ones(96))
    assert dataclasses.replace(settings, initial_std=0.05).std_of("head.weight") == 0.05
    assert dataclasses.replace(settings, initial_std=0.05).std_of("blocks.0.mlp.down.weight") == 0.0125


def test_an_rms_normed_pythia_is_the_layer_normed_one_without_means_and_shifts():
    """RMSNorm of centred inputs is LayerNorm: centre what the norms see by centring all that adds to the stream."""
    normed = build_model(dataclasses.replace(RMS_NORM, norm="layer_norm"))
    rms = build_model(RMS_NORM)
    with torch.no_grad():
        for name, parameter in normed.named_parameters():
            if name.endswith("norm.bias"):
                parameter.zero_()
                continue
            if name.endswith(("output.weight", "down.weight")):
                parameter -= parameter.mean(dim=0)
            if name == "embedding.weight":
                parameter -= parameter.mean(dim=1, keepdim=True)
            rms.get_parameter(name).copy_(parameter)
    tokens = tokens_of(RMS_NORM)
    assert (normed(tokens) - rms(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["llama: rope yarn", "pythia: sequential"])
def test_documents_are_treated_as_if_each_stood_alone(variant):
    model = build_model(ALL[variant])
    tokens = tokens_of(model.settings, windows=2)
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[0, 11] = starts[0, 12] = starts[1, 30] = True
    together = model(tokens, documents=Documents.from_starts(starts))
    assert (together[0, 12:] - model(tokens[:1, 12:])[0]).abs().max() < 1e-4
    assert (together[1, :30] - model(tokens[1:, :30])[0]).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ALL)
def test_settings_are_read_again_as_they_were_written(variant):
    settings = ALL[variant]
    assert read_settings(type(settings), as_mapping(settings)) == settings


def test_settings_of_before_scalings_and_biases_are_read():
    settings = read_settings(llama.Settings, {"vocabulary": 9, "rope_base": 500000.0, "kv_heads": None})
    assert (settings.rope_base, settings.rope_scaling, settings.attention_bias) == (500000.0, None, "none")


def test_contradictions_of_pythia_are_told():
    def faults(**told):
        return pythia.Settings(vocabulary=9, **told).faults()

    assert faults() == []
    assert faults(layers=0, mlp_width=-1) == ["layers = 0: must be more than 0", "mlp_width = -1: must be more than 0"]
    assert faults(width=50) == ["width = 50: 4 heads cannot share it evenly; change one of them"]
    assert faults(rotary_share=1.5) == ["rotary_share = 1.5: a part of each head, above 0 and up to 1"]
    assert faults(width=48) == [
        "rotary_share = 0.25: turns 3 of 12 entries of a head; rotary positions turn pairs, make it an even number"
    ]


def test_floating_point_operations_of_pythia_are_counted_by_hand():
    settings = pythia.Settings(vocabulary=50304, width=512, layers=6, heads=8)
    matrices = 6 * 12 * 512**2 + 50304 * 512
    assert settings.flops_per_token(2048) == 6 * matrices + 6 * 6 * 512 * 2048
