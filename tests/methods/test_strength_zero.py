"""A method at strength 0 leaves a run as it is, bit for bit: one test for all files of cpt/methods."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.config import build
from cpt.config.choices import names_of_choices, settings_of_choice

# The settings of each method with which it does its work and changes nothing. A new method adds its line.
STRENGTH_ZERO = {
    "distillation": {"strength": 0.0},
    "l2_to_start": {"strength": 0.0},
    "new_rows_first": {"tokens": 0, "first_row": 50},
    "reptile": {"every": 1, "step_size": 1.0},
}
LAYOUTS = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16") if zero or precision == "fp32"]


@pytest.mark.parametrize("name", names_of_choices("cpt.methods"))
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
def test_at_strength_zero_losses_norms_masters_and_moments_are_those_without_it_bit_for_bit(name, ranks):
    assert name in STRENGTH_ZERO, f"say in this file which settings of {name} mean strength 0"
    settings = settings_of_choice("cpt.methods", name)(**STRENGTH_ZERO[name])

    def work(mesh):
        told = []
        for zero, precision in LAYOUTS:
            for methods in ([], [build(settings, "Method")]):
                engine = tiny.start_engine(mesh, zero=zero, precision=precision, micro_batch=2, methods=methods)
                results = [(r.loss, r.grad_norm) for r in tiny.take_steps(engine, mesh, 0, 6)]
                told.append((results, [tiny.fragments(engine, kind) for kind in (None, "exp_avg", "exp_avg_sq")]))
        return told

    for told in on_ranks(ranks, work):
        for (results, kinds), (same_results, same_kinds) in zip(told[::2], told[1::2], strict=True):
            assert same_results == results
            for fragments, same in zip(kinds, same_kinds, strict=True):
                assert all(torch.equal(a[3], b[3]) for a, b in zip(fragments, same, strict=True))
