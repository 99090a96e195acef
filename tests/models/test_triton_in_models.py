"""Whole models through Triton's kernels beside the same models through the plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cpt_harness.parity import LLAMAS, PYTHIAS, build_model, our_results
from cpt_harness.twins import CPU

from cpt_kernels import Settings
from cpt_kernels.language import why_not

TRITON = Settings(rms_norm="triton", layer_norm="triton", swiglu="triton", gelu="triton")
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
