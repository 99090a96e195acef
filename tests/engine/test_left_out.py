"""An update that is left out leaves nothing behind: the rest is what it was for a run that never met its windows."""

from __future__ import annotations

import math

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import make
from cpt_harness.ranks import on_ranks

from cpt.methods import Seams, reptile
from cpt.progress import Progress

OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ALL = [(0, "fp32", {})] + [(zero, precision, {}) for precision in ("fp32", "bf16", "fp16") for zero in (1, 2, 3)]
# (ranks, axes of the mesh, (ZeRO stage, precision, DeepSpeed's settings))
CASES = [
    *((2, (), one) for one in [*ALL, (2, "fp16", OFFLOADED), (2, "bf16", OFFLOADED), (3, "fp32", OFFLOADED)]),
    (1, (), (0, "fp32", {})),
    (1, (), (1, "bf16", {})),
    *((2, (("pipeline", 2),), (zero, precision, {})) for zero, precision in ((0, "fp32"), (1, "bf16"), (1, "fp16"))),
    *((2, (("tensor", 2),), (zero, precision, {})) for zero, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32"))),
]
BAD = 3


class Poison(Seams):
    """Makes the loss of a step one that is no number, or too large for its gradients; counts updates."""

    def __init__(self, factor: float) -> None:
        super().__init__(reptile.Settings())
        self._factor = factor
        self.num_updates = 0

    def after_forward(self, forward):
        return forward.losses.mean() * self._factor if forward.progress.step == BAD else None

    def before_update(self, masters, progress):
        self.num_updates += 1


def steps(engine, mesh, numbers, is_bad):
    results = []
    for number in numbers:
        here = 8 // mesh.data_size
        mine = slice(mesh.data_rank * here, (mesh.data_rank + 1) * here)
        sources, progress = torch.arange(8)[mine] % 2, Progress(step=number, stage_step=number)
        windows = tiny.windows_of_step(number)[mine]
        results.append(engine.step(windows, sources, 2, 3e-3, progress, is_bad=is_bad(number)))
    return results


def is_never_bad(number):
    return None


def is_refused(number):
    return lambda loss, norm: number == BAD


def is_not_finite(number):
    return lambda loss, norm: not (math.isfinite(loss) and math.isfinite(norm))


def told(engine, mesh, numbers, is_bad, poison):
    results = steps(engine, mesh, numbers, is_bad)
    numbers_told = [(r.loss, r.grad_norm) for r in results if not r.skipped]
    kept = [tiny.fragments(engine, kind) for kind in (None, "exp_avg", "exp_avg_sq")]
    counts = [engine.masters.num_updates, poison.num_updates]
    return [r.skipped for r in results], numbers_told, kept, counts, engine.report()


def work(zero, precision, deepspeed):
    def on_mesh(mesh):
        if precision == "fp16":
            tiny.let_the_cpu_train_in_fp16()
        found = []
        # A refusal, a loss that is no number, gradients that are not finite; and last one that never met the windows.
        plan = [(is_refused, 0.0), (is_not_finite, math.nan), (is_not_finite, 1e39), (is_never_bad, 0.0)]
        for index, (is_bad, factor) in enumerate(plan):
            poison = Poison(factor)
            engine = tiny.start_engine(
                mesh, zero=zero, precision=precision, micro_batch=2, methods=[poison], deepspeed=deepspeed,
                model=make("llama, tied, all biases"),
            )  # fmt: skip
            numbers = [n for n in range(6) if index < 3 or n != BAD]
            found.append(told(engine, mesh, numbers, is_bad, poison))
        return found

    return on_mesh


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_moments_and_counts_are_those_without_the_step_bit_for_bit(case):
    ranks, axes, layout = case
    for *bad, (never_skipped, *expected, counts, report) in on_ranks(ranks, work(*layout), seconds=240, **dict(axes)):
        assert not any(never_skipped)
        for skipped, numbers, kept, counts_here, report_here in bad:
            assert skipped == [number == BAD for number in range(6)]
            assert numbers == expected[0] and counts_here == counts and report_here == report
            for fragments, same in zip(kept, expected[1], strict=True):
                assert all(torch.equal(a[3], b[3]) for a, b in zip(fragments, same, strict=True))
