"""Every variant of our models against transformers' own class: logits, losses and every gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import parity

from cpt_kernels import Settings as KernelSettings

PLAIN, CHUNKED = KernelSettings(all="plain"), KernelSettings(cross_entropy="chunked")
SCALED = [variant for variant in parity.VARIANTS if "rope" in variant]


def assert_equal_in_fp32(settings, kernels: KernelSettings) -> None:
    model = parity.build_model(settings, kernels)
    errors = parity.relative_errors(parity.our_results(model), parity.their_results(model, torch.float32))
    assert max(errors.values()) < 5e-6, errors  # measured: up to 1.0e-6, plain 2.5e-6


@pytest.mark.parametrize("variant", parity.VARIANTS)
def test_logits_losses_and_gradients_equal_those_of_transformers_in_fp32(variant):
    assert_equal_in_fp32(parity.VARIANTS[variant], parity.AUTO)


@pytest.mark.parametrize("kernels", [PLAIN, CHUNKED], ids=["plain", "chunked"])
@pytest.mark.parametrize(
    "variant", ["llama: grouped heads", "llama: tied", "pythia: sequential", "pythia: GELU by tanh"]
)
def test_other_kernels_give_the_same(variant, kernels):
    assert_equal_in_fp32(parity.VARIANTS[variant], kernels)


@pytest.mark.parametrize("variant", parity.VARIANTS)
def test_in_bf16_we_are_as_close_to_fp32_as_transformers_is(variant):
    model = parity.build_model(parity.VARIANTS[variant]).bfloat16()
    exact = parity.their_results(model, torch.float32)
    ours = parity.relative_errors(parity.our_results(model), exact)
    theirs = parity.relative_errors(parity.their_results(model, torch.bfloat16), exact)
    assert max(ours.values()) < 2 * max(theirs.values())  # measured: 0.6 to 1.6
    assert max(ours.values()) < 0.1, ours  # measured: up to 0.07
    assert ours["losses"] < 0.03, ours  # measured: up to 0.013


@pytest.mark.parametrize("variant", SCALED)
def test_a_scaling_that_were_passed_over_would_be_seen(variant):
    model = parity.build_model(parity.VARIANTS[variant])
    tokens = parity.tokens_of(model.settings)
    scaled = model(tokens)
    model.settings = dataclasses.replace(model.settings, rope_scaling=None)
    assert (scaled - model(tokens)).abs().max() > 0.03 * scaled.abs().max()


def test_losses_are_fp32_under_bf16_weights():
    for variant in ("llama: grouped heads", "pythia: parallel"):
        model = parity.build_model(parity.VARIANTS[variant]).bfloat16()
        window = parity.tokens_of(model.settings)
        assert model(window[:, :-1], window[:, 1:]).dtype is torch.float32
