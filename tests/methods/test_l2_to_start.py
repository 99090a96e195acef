"""The pull to the start is that of plain torch, under any ZeRO stage and on any mesh, and goes on after a resume."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, build, read_settings
from cpt.methods import l2_to_start
from cpt.progress import Progress
from cpt_kernels import Settings, choose

STRENGTH, NUM_STEPS, TOLERANCE = 20.0, 8, 2e-6
LLAMA = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)


def make():
    return build(LLAMA, "Model", choose(Settings(), torch.device("cpu")))


def reference(strength: float = STRENGTH) -> dict:
    """Around plain torch on one device."""
    model = make()
    model.initialise(tiny.SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    start = [p.detach().clone() for p in model.parameters()]
    losses, distances = [], []
    for step in range(NUM_STEPS):
        tokens = tiny.windows_of_step(step)
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            ways = [p - s for p, s in zip(model.parameters(), start, strict=True)]
            distances.append(sum(float(way.square().sum()) for way in ways) ** 0.5)
            for parameter, way in zip(model.parameters(), ways, strict=True):
                parameter -= tiny.rate_of_step(step) * strength * way
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        optimizer.zero_grad()
    masters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"loss": losses, "distance": distances, "masters": masters}


def start(mesh, zero: int, **more):
    method = l2_to_start.Method(l2_to_start.Settings(STRENGTH))
    return tiny.start_engine(mesh, zero=zero, model=make, methods=[method], micro_batch=2, epsilon=1e-4, **more)


def told(engine, mesh, first: int, last: int) -> dict:
    losses, distances = [], []
    for step in range(first, last):
        losses.append(tiny.take_steps(engine, mesh, step, step + 1)[0].loss)
        distances.append(engine.report()["method/l2_to_start/distance"])
    return {"loss": losses, "distance": distances, "fragments": tiny.fragments(engine)}


@pytest.mark.parametrize(
    ("ranks", "axes", "stages"),
    [
        (1, {}, (1,)),
        (2, {}, (0, 1, 2, 3)),
        (2, {"tensor": 2}, (1, 3)),
        (2, {"pipeline": 2}, (0,)),
        (2, {"sequence": 2}, (1,)),
    ],
    ids=str,
)
def test_losses_masters_and_distances_are_those_of_plain_torch(ranks, axes, stages):
    work = lambda mesh: [told(start(mesh, zero), mesh, 0, NUM_STEPS) for zero in stages]  # noqa: E731
    expected = reference()
    for of_ranks in zip(*on_ranks(ranks, work, **axes), strict=True):
        for one in of_ranks:
            assert one["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
            assert one["distance"] == pytest.approx(expected["distance"], rel=1e-4, abs=1e-7)
        masters = tiny.join([one["fragments"] for one in of_ranks])
        for name, values in expected["masters"].items():
            assert (masters[name] - values).abs().max() < TOLERANCE, name


def test_it_holds_the_weights_near_the_start():
    assert reference()["distance"][-1] < 0.8 * reference(strength=0.0)["distance"][-1]


def test_a_run_taken_up_again_on_another_mesh_is_pulled_to_the_same_start(tmp_path):
    def leave(mesh):
        engine = start(mesh, 1)
        tiny.take_steps(engine, mesh, 0, 3)
        engine.save(tmp_path / "left", {})

    def go_on(mesh):
        engine = start(mesh, 3, fill=False)
        engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
        return told(engine, mesh, 3, NUM_STEPS)

    on_ranks(2, leave)
    expected = reference()
    (one,) = on_ranks(1, go_on)
    assert one["loss"] == pytest.approx(expected["loss"][3:], abs=TOLERANCE)
    assert one["distance"] == pytest.approx(expected["distance"][3:], rel=1e-4)


def test_a_new_stage_has_a_new_start():
    def work(mesh):
        engine = start(mesh, 1)
        before = told(engine, mesh, 0, 3)["distance"]
        engine.end_stage(Progress(step=3))
        return before + told(engine, mesh, 3, 5)["distance"]

    (distances,) = on_ranks(1, work)
    assert distances[0] == distances[3] == 0.0 and min(distances[1], distances[2], distances[4]) > 0


def test_a_push_is_a_fault():
    with pytest.raises(Fault, match="strength = -1.0: at least 0"):
        read_settings(l2_to_start.Settings, {"strength": -1})
