"""AdamW's Triton twin under DeepSpeed: the same training, and the same state by the same names."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks
from cpt_harness.twins import CPU

from cpt_kernels import adamw
from cpt_kernels.language import why_not


@pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))
def test_masters_and_moments_are_those_of_torch_at_every_zero_stage():
    cases = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]

    def work(mesh):
        told = []
        for zero, precision in cases:
            for make in (adamw.fused, adamw.triton):
                # Crumbs: with so few numbers bf16 gradients are the same ones in both.
                engine = tiny.start_engine(
                    mesh, zero=zero, precision=precision, model=tiny.Crumbs, adamw=make, weight_decay=0.1
                )
                tiny.take_steps(engine, mesh, 0, 3)
                told.append([tiny.fragments(engine, kind) for kind in (None, "exp_avg", "exp_avg_sq")])
                assert engine.masters.num_updates == 3
        return told

    of_ranks = on_ranks(2, work)
    wholes = [[tiny.join(kinds) for kinds in zip(*case, strict=True)] for case in zip(*of_ranks, strict=True)]
    for ours, theirs in zip(wholes[::2], wholes[1::2], strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            for name, values in mine.items():
                assert torch.allclose(values, other[name], rtol=1e-4, atol=1e-6), name
