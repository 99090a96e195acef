"""What Llama's settings promise and how it begins; its numbers are compared in test_parity.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpt_harness.parity import LLAMAS, build_model, tokens_of

from cpt.models.llama import Model, Settings
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

CPU = torch.device("cpu")
ODD = LLAMAS["grouped heads"]


def test_initial_weights_depend_on_seed_and_name_alone():
    model, again, other = build_model(ODD, seed=7), build_model(ODD, seed=7), build_model(ODD, seed=8)
    shallow = Model(dataclasses.replace(ODD, layers=1), choose(KernelSettings(), CPU))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if model.decays(name):
            assert not torch.equal(parameter, other.get_parameter(name))
    name = "blocks.0.attention.query.weight"
    assert torch.equal(shallow.initial_value(name, 7), model.initial_value(name, 7))


def test_initialising_leaves_the_random_numbers_of_the_run_alone():
    model = Model(ODD, choose(KernelSettings(), CPU))
    before = torch.get_rng_state()
    model.initialise(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_have_the_asked_spread():
    settings = Settings(vocabulary=500, width=96, layers=8, heads=4, initial_std=0.05)
    model = Model(settings, choose(KernelSettings(), CPU))
    model.initialise(0)
    small = 0.05 / math.sqrt(16)
    spreads = {"embedding.weight": 0.05, "blocks.3.attention.query.weight": 0.05, "blocks.3.mlp.up.weight": 0.05,
               "blocks.3.attention.output.weight": small, "blocks.3.mlp.down.weight": small}  # fmt: skip
    for name, spread in spreads.items():
        assert model.get_parameter(name).std().item() == pytest.approx(spread, rel=0.03), name
    assert torch.equal(model.get_parameter("blocks.3.mlp_norm.weight"), torch.ones(96))


def test_a_tied_head_is_the_embedding_itself():
    model = build_model(dataclasses.replace(ODD, tied=True))
    assert model.head.weight is model.embedding.weight
    model.bfloat16()
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("tied", [False, True])
def test_floating_point_operations_are_those_of_an_8b_llama(tied):
    llama_8b = Settings(vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, tied=tied)
    assert llama_8b.num_parameters == (8_030_261_248 if not tied else 8_030_261_248 - 128256 * 4096)
    # The head multiplies whether it is tied or not. By hand: 6 x 7.505e9 + 6 x 32 x 4096 x 8192.
    assert llama_8b.flops_per_token(8192) == pytest.approx(51.47e9, rel=1e-3)


def test_no_token_sees_a_later_one():
    model = build_model(ODD)
    tokens = tokens_of(ODD)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % ODD.vocabulary
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:20] == 0).all() and (difference[20:] > 0).all()


def test_a_sequence_beyond_the_longest_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens is longer than model\.longest_sequence = 64"):
        build_model(ODD)(torch.zeros(1, 65, dtype=torch.int64))


def test_contradictory_settings_are_told_all_at_once():
    assert Settings(vocabulary=0, layers=-1).faults() == [
        "vocabulary = 0: must be more than 0",
        "layers = -1: must be more than 0",
    ]
    assert Settings(vocabulary=9, width=50, heads=4, kv_heads=3).faults() == [
        "width = 50: 4 heads cannot share it evenly; change it or set head_width",
        "kv_heads = 3: 4 heads cannot share them evenly; use 1, 2, 4",
    ]
    assert Settings(vocabulary=9, width=12, heads=4).faults() == [
        "width / heads = 3: rotary positions turn pairs of entries; make it even"
    ]
    assert Settings(vocabulary=9, width=12, heads=4, head_width=5).faults() == [
        "head_width = 5: rotary positions turn pairs of entries; make it even"
    ]
    assert ODD.faults() == []


def test_the_feed_forward_width_is_eight_thirds_in_multiples_of_64():
    assert Settings(vocabulary=9, width=256).width_of_mlp == 704
    assert Settings(vocabulary=9, width=384).width_of_mlp == 1024
