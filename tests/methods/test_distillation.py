"""The teacher of a stage is the model at its start, on any mesh, after any resume; what it teaches is plain torch's."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import starts_of_step
from cpt_harness.ranks import on_ranks
from torch import nn
from torch.nn import functional

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, build, read_settings
from cpt.methods import distillation
from cpt.progress import Progress
from cpt_kernels import Settings, choose
from cpt_kernels.documents import model_inputs

STRENGTH, TEMPERATURE, NUM_STEPS, TOLERANCE = 3.0, 1.7, 6, 2e-6
# Three blocks, so that a pipeline may have a part that is neither the first nor the last.
LLAMA = dataclasses.replace(tiny.LLAMA, layers=3, heads=4, kv_heads=2, head_width=6)


def make():
    return build(LLAMA, "Model", choose(Settings(), torch.device("cpu")))


def reference(documents: bool = False, strength: float = STRENGTH) -> dict:
    """Around plain torch on one device."""
    model, teacher = make(), make()
    for one in (model, teacher):
        one.initialise(tiny.SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    told = {"loss": [], "divergence": []}
    for step in range(NUM_STEPS):
        tokens, starts = tiny.windows_of_step(step), starts_of_step(step) if documents else None
        given, targets, *of_documents = model_inputs(tokens, starts, torch.device("cpu"))
        counts = torch.ones_like(targets, dtype=torch.bool) if starts is None else ~starts[:, 1:]
        loss = model(given, targets, *of_documents).sum() / counts.sum()
        student = functional.log_softmax(model(given, None, *of_documents) / TEMPERATURE, dim=-1)
        with torch.no_grad():
            wise = functional.log_softmax(teacher(given, None, *of_documents) / TEMPERATURE, dim=-1)
        all_kl = functional.kl_div(student, wise, log_target=True, reduction="none").sum(dim=-1)
        divergence = (all_kl * counts).sum() / counts.sum()
        (loss + strength * TEMPERATURE**2 * divergence).backward()
        told["loss"].append(float(loss.detach()))
        told["divergence"].append(float(divergence.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        optimizer.zero_grad()
    return {**told, "masters": {name: parameter.detach() for name, parameter in model.named_parameters()}}


def start(mesh, zero: int, **more):
    method = distillation.Method(distillation.Settings(STRENGTH, TEMPERATURE))
    return tiny.start_engine(mesh, zero=zero, model=make, methods=[method], micro_batch=2, epsilon=1e-4, **more)


def told(engine, mesh, first: int, last: int, documents: bool = False) -> dict:
    losses, divergences = [], []
    for step in range(first, last):
        starts_of = starts_of_step if documents else None
        losses.append(tiny.take_steps(engine, mesh, step, step + 1, starts_of=starts_of)[0].loss)
        divergences.append(engine.report()["method/distillation/divergence"])
        engine.score(tiny.windows_of_step(step)[:2])
    return {"loss": losses, "divergence": divergences, "fragments": tiny.fragments(engine)}


@pytest.mark.parametrize(
    ("ranks", "axes", "stages", "documents", "more"),
    [
        (1, {}, (1,), False, {}),
        (2, {}, (0, 1, 2, 3), True, {}),
        (2, {"tensor": 2}, (1, 3), True, {}),
        (2, {"tensor": 2}, (0,), False, {}),
        (2, {"tensor": 2}, (1,), False, {"shares_norms": True}),
        (2, {"sequence": 2}, (1, 3), True, {}),
        (2, {"pipeline": 2}, (0, 1), True, {}),
        (3, {"pipeline": 3}, (1,), False, {}),
        (4, {"pipeline": 2}, (1,), True, {}),
        (4, {"pipeline": 2, "tensor": 2}, (0, 1), True, {}),
    ],
    ids=str,
)
def test_losses_masters_and_divergences_are_those_of_plain_torch(ranks, axes, stages, documents, more):
    work = lambda mesh: [told(start(mesh, zero, **more), mesh, 0, NUM_STEPS, documents) for zero in stages]  # noqa: E731
    expected = reference(documents)
    for of_ranks in zip(*on_ranks(ranks, work, **axes), strict=True):
        for one in of_ranks:
            assert one["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
            assert one["divergence"] == pytest.approx(expected["divergence"], abs=TOLERANCE)
        masters = tiny.join([one["fragments"] for one in of_ranks])
        for name, values in expected["masters"].items():
            assert (masters[name] - values).abs().max() < TOLERANCE, name


def test_it_holds_the_predictions_near_the_teachers():
    assert reference()["divergence"][-1] < 0.7 * reference(strength=0.0)["divergence"][-1]


def test_with_weights_that_are_gathered_for_each_layer_it_is_the_same():
    work = lambda mesh: told(  # noqa: E731
        start(mesh, 3, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}), mesh, 0, NUM_STEPS
    )
    for axes in ({}, {"tensor": 2}):
        for one in on_ranks(2, work, **axes):
            assert one["loss"] == pytest.approx(reference()["loss"], abs=TOLERANCE)


@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}], ids=str)
def test_in_bf16_the_teacher_is_the_model_before_the_first_step(axes):
    def work(mesh):
        return told(start(mesh, 1, precision="bf16"), mesh, 0, NUM_STEPS)

    for one in on_ranks(2, work, **axes):
        assert one["divergence"][0] == pytest.approx(0.0, abs=1e-7)
        assert one["loss"] == pytest.approx(reference()["loss"], abs=0.03)


def test_in_bf16_the_teacher_is_in_bf16_before_it_goes_to_the_device(monkeypatch):
    """A device that has room for another model in low precision need not have it for one in fp32."""

    def work(mesh):
        moved, move = [], nn.Module.to
        engine = start(mesh, 1, precision="bf16")
        note = lambda model, *to: moved.append([str(p.dtype) for p in model.parameters()]) or move(model, *to)  # noqa: E731
        monkeypatch.setattr(nn.Module, "to", note)
        tiny.take_steps(engine, mesh, 0, 1)
        return moved

    ((types,),) = on_ranks(1, work)
    assert set(types) == {"torch.bfloat16"}


def test_a_run_taken_up_again_on_another_mesh_has_the_same_teacher(tmp_path):
    def leave(mesh):
        engine = start(mesh, 1)
        tiny.take_steps(engine, mesh, 0, 3)
        engine.save(tmp_path / "left", {})

    def go_on(mesh, zero):
        engine = start(mesh, zero, fill=False)
        engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
        return told(engine, mesh, 3, NUM_STEPS)

    on_ranks(2, leave)
    expected = reference()
    for ranks, zero, axes in ((1, 3, {}), (2, 3, {"tensor": 2}), (2, 1, {"pipeline": 2})):
        for one in on_ranks(ranks, partial(go_on, zero=zero), **axes):
            assert one["loss"] == pytest.approx(expected["loss"][3:], abs=TOLERANCE)
            assert one["divergence"] == pytest.approx(expected["divergence"][3:], abs=TOLERANCE)


@pytest.mark.parametrize(("ranks", "axes"), [(1, {}), (2, {"pipeline": 2})], ids=str)
def test_a_new_stage_has_a_new_teacher(ranks, axes):
    def work(mesh):
        engine = start(mesh, 1)
        before = told(engine, mesh, 0, 3)["divergence"]
        engine.end_stage(Progress(step=3))
        return before + told(engine, mesh, 3, 5)["divergence"]

    divergences = on_ranks(ranks, work, **axes)[0]
    assert divergences[0] == pytest.approx(0.0, abs=1e-7) and divergences[3] == pytest.approx(0.0, abs=1e-7)
    assert min(divergences[1], divergences[2], divergences[4]) > 1e-4


def test_steps_that_fill_moments_before_there_is_a_teacher_go_through_a_pipeline():
    def work(mesh):
        engine = start(mesh, 1)
        tokens = tiny.windows_of_step(0)
        engine.warm(tokens, torch.zeros(len(tokens), dtype=torch.long))
        return told(engine, mesh, 0, 1)["divergence"]

    assert on_ranks(2, work, pipeline=2) == [[pytest.approx(0.0, abs=1e-7)]] * 2


def test_where_the_embedding_is_tied_both_of_its_parts_teach():
    tied = dataclasses.replace(LLAMA, tied=True)

    def work(mesh):
        model = lambda: build(tied, "Model", choose(Settings(), torch.device("cpu")))  # noqa: E731
        method = distillation.Method(distillation.Settings(STRENGTH, TEMPERATURE))
        engine = tiny.start_engine(mesh, model=model, methods=[method], micro_batch=2, epsilon=1e-4)
        return told(engine, mesh, 0, NUM_STEPS)

    (expected,) = on_ranks(1, work)
    for one in on_ranks(2, work, pipeline=2):
        assert one["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
        assert one["divergence"] == pytest.approx(expected["divergence"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"strength": -1}, "strength = -1.0: at least 0"), ({"temperature": 0}, "temperature = 0.0: above 0")],
)
def test_settings_that_teach_nothing_sensible_are_faults(settings, told):
    with pytest.raises(Fault, match=told):
        read_settings(distillation.Settings, settings)
