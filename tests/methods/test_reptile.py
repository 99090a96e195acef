"""Reptile under any ZeRO stage is Reptile on one device: same numbers, kept through checkpoints, on updates only."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, read_settings
from cpt.methods import Seams, reptile

NUM_STEPS, EVERY, STEP_SIZE = 10, 3, 0.4
TOLERANCE = 2e-6
STAGES = (0, 1, 2, 3)


def method(every: int = EVERY, step_size: float = STEP_SIZE) -> reptile.Method:
    return reptile.Method(reptile.Settings(every, step_size))


def reference(every: int = EVERY, without: int | None = None) -> dict:
    """Reptile as the paper has it, around plain torch on one device. `without`: a step whose update is left out."""
    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    anchor = [p.detach().clone() for p in model.parameters()]
    losses, displacements, updates = [], [], 0
    for step in range(NUM_STEPS):
        tokens = tiny.windows_of_step(step)
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        if step != without:
            optimizer.step()
            updates += 1
        optimizer.zero_grad()
        if step != without and updates % every == 0:
            with torch.no_grad():
                squares = sum(float((p - a).square().sum()) for p, a in zip(model.parameters(), anchor, strict=True))
                displacements.append(squares**0.5)
                for parameter, old in zip(model.parameters(), anchor, strict=True):
                    parameter.copy_(old + STEP_SIZE * (parameter - old))
                    old.copy_(parameter)
    return {
        "loss": losses,
        "displacement": displacements,
        "masters": {n: p.detach() for n, p in model.named_parameters()},
    }


def steps_told(engine, mesh, first: int, last: int) -> tuple[list[float], list[dict]]:
    losses, reports = [], []
    for step in range(first, last):
        losses.append(tiny.take_steps(engine, mesh, step, step + 1)[0].loss)
        reports.append(engine.report())
    return losses, reports


def assert_near(masters: dict, expected: dict) -> None:
    assert masters.keys() == expected.keys()
    for name in expected:
        assert (masters[name] - expected[name]).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_masters_and_displacements_equal_those_of_the_unsharded_computation(ranks):
    def work(mesh):
        told = []
        for zero in STAGES:
            for micro in (None, 2):  # with accumulation it must not act on a micro-batch
                engine = tiny.start_engine(mesh, zero=zero, micro_batch=micro, methods=[method()])
                told.append((*steps_told(engine, mesh, 0, NUM_STEPS), tiny.fragments(engine)))
        return told

    expected = reference()
    for of_ranks in zip(*on_ranks(ranks, work), strict=True):
        for losses, reports, _ in of_ranks:
            assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
            told = [report["method/reptile/displacement"] for report in reports if report]
            assert told == pytest.approx(expected["displacement"], rel=1e-5)
            assert [step for step, report in enumerate(reports) if report] == [2, 5, 8]
        assert_near(tiny.join([fragments for _, _, fragments in of_ranks]), expected["masters"])


def test_it_matters():
    plain, other = reference(every=NUM_STEPS + 1), reference()
    differences = [float((plain["masters"][name] - other["masters"][name]).abs().max()) for name in plain["masters"]]
    assert min(differences) > 100 * TOLERANCE


@pytest.mark.parametrize("left_at", [2, 4])
def test_a_run_taken_up_in_the_middle_of_a_window_on_another_mesh_and_stage_goes_on_the_same(tmp_path, left_at):
    def leave(mesh):
        engine = tiny.start_engine(mesh, zero=1, methods=[method()])
        tiny.take_steps(engine, mesh, 0, left_at)
        engine.save(tmp_path / "left", {})

    def go_on(mesh):
        told = []
        for zero in (0, 3):
            engine = tiny.start_engine(mesh, zero=zero, methods=[method()], fill=False)
            engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
            told.append((*steps_told(engine, mesh, left_at, NUM_STEPS), tiny.fragments(engine)))
        return told

    on_ranks(2, leave)
    expected = reference()
    for ranks in (1, 4):
        for of_ranks in zip(*on_ranks(ranks, go_on), strict=True):
            assert of_ranks[0][0] == pytest.approx(expected["loss"][left_at:], abs=TOLERANCE)
            assert_near(tiny.join([fragments for _, _, fragments in of_ranks]), expected["masters"])


class Poison(Seams):
    """Makes the gradient of step 1 not finite."""

    def after_forward(self, forward):
        return forward.losses.mean() * float("nan") if forward.progress.step == 1 else None


def test_a_skipped_update_does_not_count():
    def work(mesh):
        told = []
        for zero in STAGES:
            engine = tiny.start_engine(mesh, zero=zero, methods=[Poison(reptile.Settings()), method()])
            losses, reports = steps_told(engine, mesh, 0, NUM_STEPS)
            told.append((losses, reports, tiny.fragments(engine)))
        return told

    expected = reference(without=1)
    for of_ranks in zip(*on_ranks(2, work), strict=True):
        losses, reports, _ = of_ranks[0]
        assert [step for step, report in enumerate(reports) if report] == [3, 6, 9]
        assert losses == pytest.approx(expected["loss"], abs=TOLERANCE)
        assert_near(tiny.join([fragments for *_, fragments in of_ranks]), expected["masters"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every": 0}, "every = 0: at least 1 update in a window"),
        ({"step_size": 0}, r"step_size = 0.0: above 0 \(keep nothing\) and at most 1 \(keep all\)"),
        ({"step_size": 1.5}, "step_size = 1.5: above 0"),
    ],
    ids=str,
)
def test_settings_that_are_no_interpolation_are_faults(settings, told):
    with pytest.raises(Fault, match=told):
        read_settings(reptile.Settings, settings)
