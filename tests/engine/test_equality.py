"""A step under DeepSpeed is the step of plain torch: every ZeRO stage, any number of ranks, any micro-batch."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

NUM_STEPS = 10
# Gradients are summed in another order: measured 6e-7 in losses of 4.5, 1.2e-6 in norms of 2.9, 5e-7 in masters.
TOLERANCE = 2e-6
# (ZeRO stage, ranks, micro-batch): 8 windows a step, so that 2 is an accumulation of 4 and 2 on 1 and 2 ranks.
FP32 = [(zero, ranks, micro) for ranks in (1, 2) for zero in (0, 1, 2, 3) for micro in (None, 2)]
FP32 += [(1, 4, 1), (3, 4, None)]
BF16 = [(zero, ranks, micro) for ranks, micro in ((1, None), (2, 2)) for zero in (1, 2, 3)]


def reference(clip: float = 1.0, weight_decay: float = 0.1) -> dict:
    """The same training in plain torch on one device, nothing of ours but the model's forward pass."""
    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    told: dict = {"loss": [], "norm": [], "by_source": []}
    for step in range(NUM_STEPS):
        tokens = tiny.windows_of_step(step)
        losses = model(tokens[:, :-1], tokens[:, 1:])
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        optimizer.zero_grad()
        told["loss"].append(float(losses.detach().mean()))
        told["norm"].append(float(norm))
        told["by_source"].append([float(losses.detach()[source::2].mean()) for source in (0, 1)])
    return {**told, "masters": {name: p.detach() for name, p in model.named_parameters()}}


def train(mesh, zero: int, micro: int | None, precision: str = "fp32", **optimizer: float) -> dict:
    engine = tiny.start_engine(mesh, zero=zero, precision=precision, micro_batch=micro, **optimizer)
    results = tiny.take_steps(engine, mesh, 0, NUM_STEPS)
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "by_source": [[r.loss_by_source[0], r.loss_by_source[1]] for r in results],
        "fragments": tiny.fragments(engine),
    }


def train_all(cases: list, precision: str, **optimizer: float) -> dict:
    """Every case's results and joined masters; all cases of one number of ranks in the same processes."""
    told = {}
    for ranks in sorted({case[1] for case in cases}):
        here = [case for case in cases if case[1] == ranks]
        of_ranks = on_ranks(
            ranks,
            lambda mesh, here=here: [train(mesh, zero, micro, precision, **optimizer) for zero, _, micro in here],
        )
        for index, case in enumerate(here):
            mine = [results[index] for results in of_ranks]
            assert all(one["loss"] == mine[0]["loss"] and one["norm"] == mine[0]["norm"] for one in mine)
            told[case] = {**mine[0], "masters": tiny.join([one["fragments"] for one in mine])}
    return told


@pytest.fixture(scope="module")
def plain() -> dict:
    return reference()


@pytest.fixture(scope="module")
def fp32() -> dict:
    return train_all(FP32, "fp32")


@pytest.fixture(scope="module")
def bf16() -> dict:
    return train_all(BF16, "bf16")


def largest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("case", FP32, ids=str)
def test_fp32_losses_norms_and_masters_equal_those_of_plain_torch(fp32, plain, case):
    mine = fp32[case]
    assert mine["loss"] == pytest.approx(plain["loss"], abs=TOLERANCE)
    assert mine["norm"] == pytest.approx(plain["norm"], abs=TOLERANCE)
    assert torch.tensor(mine["by_source"]).sub(torch.tensor(plain["by_source"])).abs().max() < TOLERANCE
    assert largest(mine["masters"], plain["masters"]) < TOLERANCE


def test_the_reference_learns_and_is_clipped(plain):
    assert plain["loss"][-1] < plain["loss"][0] - 0.3
    assert min(plain["norm"]) > 1.0, "the clip of 1.0 must matter in every step"


def test_other_clip_or_decay_or_rate_would_be_seen(plain, monkeypatch):
    for other in (reference(clip=0.0), reference(weight_decay=0.0)):
        assert largest(other["masters"], plain["masters"]) > 10 * TOLERANCE
    right = tiny.rate_of_step
    monkeypatch.setattr(tiny, "rate_of_step", lambda step: right(step + 1))
    assert largest(reference()["masters"], plain["masters"]) > 10 * TOLERANCE


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_stage_clips_as_told_and_tells_the_norm_before_clipping(clip):
    expected = reference(clip=clip)
    for case, mine in train_all([(zero, 2, None) for zero in (0, 1, 2, 3)], "fp32", clip=clip).items():
        assert mine["norm"] == pytest.approx(expected["norm"], abs=TOLERANCE), case
        assert largest(mine["masters"], expected["masters"]) < TOLERANCE, case


def test_bf16_tells_the_norm_without_a_clip_too():
    told = train_all([(zero, 2, None) for zero in (1, 2, 3)], "bf16", clip=0.0)
    expected = reference(clip=0.0)["norm"]
    for mine in told.values():
        assert mine["norm"][0] == pytest.approx(expected[0], rel=0.02)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_losses_stay_near_those_of_fp32(bf16, plain, case):
    # bf16 keeps 8 bits: measured 0.004 in losses of 3 to 4.5, 0.024 in norms of 2 to 3, 0.02 in masters in ten steps.
    assert bf16[case]["loss"] == pytest.approx(plain["loss"], abs=0.02)
    assert bf16[case]["norm"] == pytest.approx(plain["norm"], rel=0.05)
    assert largest(bf16[case]["masters"], plain["masters"]) < 0.06


def test_bf16_masters_keep_bits_that_bf16_has_not(bf16):
    for mine in bf16.values():
        for name, values in mine["masters"].items():
            assert not torch.equal(values, values.bfloat16().float()), name
