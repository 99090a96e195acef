"""Whole models through Triton's kernels beside the same models through the plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cpt_harness.parity import LLAMAS, PYTHIAS, build_model, our_results
from cpt_harness.twins import CPU

from cpt.models.layers import compiled, recompute
from cpt.models.layers.blocks import prepare_blocks
from cpt_kernels import Settings
from cpt_kernels.language import why_not

# Attention and rotary have tests of their own, and take the interpreter long.
TRITON = Settings(rms_norm="triton", layer_norm="triton", swiglu="triton", gelu="triton", cross_entropy="triton")
MODELS = {
    "Llama": LLAMAS["grouped heads"],
    "Pythia": PYTHIAS["sequential"],
    "Pythia, parallel": PYTHIAS["parallel"],
    "Pythia, RMSNorm": replace(PYTHIAS["sequential"], norm="rms_norm"),
}


@pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))
@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_gradients_of_a_model_are_those_of_the_plain_twins(name):
    plain, fused = (our_results(build_model(MODELS[name], kernels)) for kernels in (Settings(all="plain"), TRITON))
    for what, expected in plain.items():
        assert (fused[what] - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-8, what


@pytest.mark.long
@pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))
@pytest.mark.parametrize("name", ["Llama", "Pythia"])
def test_a_model_that_is_compiled_leaves_the_small_operations_to_the_compiler(name):
    plain, fused = (build_model(MODELS[name], kernels) for kernels in (Settings(all="plain"), TRITON))
    prepare_blocks(fused, recompute.Settings(), compiled.Settings(blocks=True, backend="aot_eager"))
    found = our_results(fused)
    for what, expected in our_results(plain).items():
        assert (found[what] - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-8, what
